"""What is in a data file: its schema, what its facts have and lack, contradictions, malformed records."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pipeline.facts.conflicts import count_conflicts, find_conflicts
from pipeline.facts.fact import Fact
from pipeline.facts.read import read
from pipeline.facts.select import clean_probes, unusable

_NUM_EXAMPLES = 2
_NUM_SHOWN = 20
_MAX_WIDTH = 160
"""Characters of an example's line."""


def inspect(path: str | list[str], format: str = "auto") -> dict[str, Any]:
    """A report on the file, folder or hub id at `path`, as JSON values; see `render` for the text.

    Malformed records are listed, not refused. Raises InputError for a file that cannot be read, or of no
    known schema.
    """
    reading = read(path, format)
    # Old answers are not demanded: whether an experiment needs them is not known here.
    reasons = [unusable(fact, needs_old_answer=False) for fact in reading.facts]
    usable = [fact for fact, reason in zip(reading.facts, reasons, strict=True) if reason is None]
    _, dropped_probes = clean_probes(usable)
    return {
        "path": reading.path,
        "format": reading.format,
        "num_records": reading.num_records,
        "num_facts": len(usable),
        "fields": dict(reading.fields),
        "having": _having(usable),
        "dropped": dict(Counter(reason for reason in reasons if reason)),
        "dropped_probes": dict(dropped_probes),
        "conflicts": count_conflicts(find_conflicts(usable)),
        "bad_rows": [row._asdict() for row in reading.bad_rows],
        "examples": [asdict(fact) for fact in usable[:_NUM_EXAMPLES]],
    }


def render(report: dict[str, Any]) -> str:
    """The report as plain text."""
    num_records, num_facts = report["num_records"], report["num_facts"]
    dropped = [f"{reason}: {count}" for reason, count in report["dropped"].items()]
    dropped_probes = [f"{reason}: {count}" for reason, count in report["dropped_probes"].items()]
    conflicts = [
        f"{kind}: {counts['num_facts']} facts in {counts['num_groups']} groups"
        for kind, counts in report["conflicts"].items()
    ]
    examples = [line for example in report["examples"] for line in _example(example)]
    lines = [
        f"{report['path']}: {report['format']}, {num_records} records, {num_facts} usable facts",
        f"  fields: {_counts(report['fields'], num_records)}",
        f"  facts having: {_counts(report['having'], num_facts)}",
        *_section("dropped", dropped),
        *_section("locality and portability questions dropped", dropped_probes),
        *_section("contradictions", conflicts),
        *_bad_rows(report["bad_rows"]),
        *_section("examples", examples),
    ]
    return "\n".join(lines)


def _having(facts: list[Fact]) -> dict[str, int]:
    fields: dict[str, Callable[[Fact], object]] = {
        "subject": lambda fact: fact.subject,
        "old answer": lambda fact: fact.old_answers,
        "rephrasings": lambda fact: fact.rephrasings,
        "locality": lambda fact: fact.locality,
        "portability": lambda fact: fact.portability,
    }
    return {name: sum(bool(has(fact)) for fact in facts) for name, has in fields.items()}


def _counts(counts: dict[str, int], total: int) -> str:
    """Names, with the count where it is not the total."""
    return ", ".join(
        name if count == total else f"{name} ({count} of {total})" for name, count in counts.items()
    )


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"  {title}:", *(f"    {line}" for line in lines)] if lines else []


def _bad_rows(rows: list[dict[str, str]]) -> list[str]:
    lines = [f"{row['where']}: {row['reason']}" for row in rows[:_NUM_SHOWN]]
    if len(rows) > _NUM_SHOWN:
        lines.append(f"and {len(rows) - _NUM_SHOWN} more (--json lists all)")
    return _section(f"malformed records: {len(rows)}", lines)


def _example(example: dict[str, Any]) -> list[str]:
    old = _alternatives(example["old_answers"]) or "(none)"
    lines = [f"[{example['id']}] {example['prompt']}", f"  {old} -> {example['new_answer']}"]
    lines += [f"  rephrased: {text}" for text in example["rephrasings"][:2]]
    for name in ("locality", "portability"):
        for probe in example[name][:2]:
            lines.append(f"  {name}: {probe['prompt']} -> {_alternatives(probe['answers'])}")
    # Only long lines: `shorten` also collapses blanks, and would take the indent of every other line.
    return [
        textwrap.shorten(line.strip(), _MAX_WIDTH, placeholder=" ...") if len(line) > _MAX_WIDTH else line
        for line in lines
    ]


def _alternatives(answers: list[str]) -> str:
    more = f" | ({len(answers) - 3} more)" if len(answers) > 3 else ""
    return " | ".join(answers[:3]) + more
