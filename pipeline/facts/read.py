"""From a data file to facts: find its schema, read every record, set the malformed ones aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.errors import InputError
from pipeline.facts.fact import Fact
from pipeline.facts.fields import RowError
from pipeline.facts.readers import READERS, alpaca, detect, zsre
from pipeline.facts.rows import BadRow, Row, read_rows

_NUM_SHOWN = 5
_NUM_SNIFFED = 20
"""Records that the schema is looked for in: the first may be malformed."""


@dataclass
class Reading:
    """What a file holds. A record may hold several facts (MQuAKE), or none (a malformed one)."""

    path: str
    format: str
    num_records: int
    facts: list[Fact]
    bad_rows: list[BadRow]
    fields: Counter[str]
    """How many records have each field."""


def read(path: str | list[str], format: str = "auto", old_answer: str = "pred") -> Reading:
    """Read `path`: a file, a folder or hub id for `datasets`, or an [old, new] pair of Alpaca files.

    `old_answer` is for ZsRE: the field with the old answers, `pred` or `answers`.
    Raises InputError for a missing or unreadable file, an unknown schema, or another one than `format` names.
    """
    if format not in ("auto", *READERS):
        raise InputError(f"facts.format: no schema {format!r}; known ones are auto, {', '.join(READERS)}")
    paths = [path] if isinstance(path, str) else path
    if len(paths) > 2:
        raise InputError(f"facts.path: {len(paths)} files; give one, or an [old, new] pair of Alpaca files")
    files = [read_rows(file) for file in paths]
    # Every file is checked, but the last one's schema counts: of a pair that is the file of new answers.
    name = [_recognise(file, rows, bad, format) for file, (rows, bad) in zip(paths, files, strict=True)][-1]
    rows = files[-1][0] if len(files) == 1 else _paired(files[0][0], files[1][0], paths, name)
    bad = [problem for _, problems in files for problem in problems]
    facts, malformed = _read_facts(rows, _reader(name, old_answer))
    fields = Counter(field for row in rows for field in row.value)
    return Reading(" + ".join(paths), name, len(rows) + len(bad), facts, bad + malformed, fields)


def refuse_bad_rows(reading: Reading) -> None:
    """Raise InputError for malformed records, naming the first ones and their number."""
    num_bad = len(reading.bad_rows)
    if not num_bad:
        return
    shown = "; ".join(f"{row.where}: {row.reason}" for row in reading.bad_rows[:_NUM_SHOWN])
    more = f"; and {num_bad - _NUM_SHOWN} more" if num_bad > _NUM_SHOWN else ""
    raise InputError(
        f"{reading.path}: {num_bad} of {reading.num_records} records are malformed: {shown}{more}"
    )


def _recognise(path: str, rows: list[Row], bad: list[BadRow], format: str) -> str:
    """The name of the file's schema: `format` if its records look so, the detected one for `auto`."""
    if not rows:
        raise InputError(f"{path}: no records" + (f": {bad[0].where}: {bad[0].reason}" if bad else ""))
    sniffed = [row.value for row in rows[:_NUM_SNIFFED]]
    # The named schema goes first: some records look like two (CounterFact and KnowEdit).
    if format != "auto" and any(READERS[format].matches(value) for value in sniffed):
        return format
    found = next((name for name in map(detect, sniffed) if name), None)
    if found is None:
        raise InputError(
            f"{path}: unknown schema with the fields {', '.join(sniffed[0])}; "
            f"known ones are {', '.join(READERS)} (see docs/facts.md)"
        )
    if format not in ("auto", found):
        raise InputError(
            f"{path}: does not look like {format}: looks like {found}; set facts.format={found} or auto"
        )
    return found


def _reader(name: str, old_answer: str) -> Callable[[dict[str, Any], str], list[Fact]]:
    return partial(zsre.read, old_answer=old_answer) if name == "zsre" else READERS[name].read


def _paired(old: list[Row], new: list[Row], paths: list[str], name: str) -> list[Row]:
    if name != "alpaca":
        raise InputError(
            "facts.path: two files are an [old, new] pair of Alpaca files, "
            f"but {paths[1]} looks like {name}; give one file"
        )
    return alpaca.pair(old, new)


def _read_facts(
    rows: list[Row], reader: Callable[[dict[str, Any], str], list[Fact]]
) -> tuple[list[Fact], list[BadRow]]:
    facts: list[Fact] = []
    bad: list[BadRow] = []
    taken: set[str] = set()
    for i, row in enumerate(rows):
        try:
            facts += [_with_own_id(fact, taken) for fact in reader(row.value, str(i))]
        except RowError as error:
            bad.append(BadRow(row.where, str(error)))
    return facts, bad


def _with_own_id(fact: Fact, taken: set[str]) -> Fact:
    """`fact`, renamed if another one of the file has its id: an evaluation's rows are found by id."""
    name, number = fact.id, 1
    while name in taken:
        number += 1
        name = f"{fact.id}-{number}"
    taken.add(name)
    return fact if name == fact.id else replace(fact, id=name)
