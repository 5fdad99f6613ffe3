"""The `facts` stage: from the user's data file to `facts.jsonl`, the records that all later stages read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.config import Facts
from pipeline.context import Context, log
from pipeline.facts.conflicts import count_conflicts
from pipeline.facts.fact import Fact, write_facts
from pipeline.facts.read import read, refuse_bad_rows
from pipeline.facts.select import Selection, select


def run(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Write `facts.jsonl`; return what was read, dropped and kept, each with its count."""
    config = Facts.model_validate(section["facts"])
    reading = read(config.path, config.format, config.old_answer)
    refuse_bad_rows(reading)
    selection = select(reading.facts, config, section["needs_old_answer"])
    write_facts(out / "facts.jsonl", selection.facts)
    log.info(
        "facts: %d of %d from %s (%s)", len(selection.facts), len(reading.facts), reading.path, reading.format
    )
    return {
        "format": reading.format,
        "num_records": reading.num_records,
        "num_read": len(reading.facts),
        "num_facts": len(selection.facts),
        "num_over_limit": selection.num_over_limit,
        "dropped": dict(selection.dropped),
        "dropped_probes": dict(selection.dropped_probes),
        "conflicts": count_conflicts(selection.conflicts),
        "warnings": [*_losses(selection, config, len(reading.facts)), *_gaps(selection.facts)],
    }


def _losses(selection: Selection, config: Facts, num_read: int) -> list[str]:
    """What was taken out of the data, as sentences."""
    dropped = dict(selection.dropped)
    num_contradicting = dropped.pop("contradiction", 0)
    warnings = [
        f"{count} of {num_read} facts were dropped: {reason.replace('_', ' ')}"
        for reason, count in dropped.items()
    ]
    # Contradictions get a sentence of their own: with `keep_first` fewer facts are dropped than contradict.
    if selection.conflicts:
        num_facts = len({i for conflict in selection.conflicts for i in conflict.facts})
        warnings.append(
            f"{num_facts} of {num_read} facts ({num_facts / num_read:.1%}) contradict another fact; "
            f"{num_contradicting} of them were dropped (facts.conflicts={config.conflicts})"
        )
    num_edited = selection.dropped_probes["edited_question"]
    if num_edited:
        warnings.append(f"{num_edited} locality questions were dropped: another fact changes their answer")
    return warnings


def _gaps(facts: list[Fact]) -> list[str]:
    """What the data cannot tell, as sentences."""
    num_lacking = {
        "an old answer: nothing to forget, and no leakage to measure": sum(not f.old_answers for f in facts),
        "a rephrasing: no generality": sum(not f.rephrasings for f in facts),
        "a locality question: no locality": sum(not f.locality for f in facts),
    }
    gaps = [f"{num} of {len(facts)} facts lack {what} there" for what, num in num_lacking.items() if num]
    return gaps + _clashes(facts)


def _clashes(facts: list[Fact]) -> list[str]:
    """A sentence if many locality questions ask for the old answer itself, as all of CounterFact's do."""
    num_clashing = sum(any(probe.answers[0] in fact.old_answers for probe in fact.locality) for fact in facts)
    if num_clashing < len(facts) / 10:  # a chance meeting here and there moves no score
        return []
    return [
        f"in {num_clashing} of {len(facts)} facts a locality question's answer is the old answer itself: "
        "forgetting lowers locality"
    ]
