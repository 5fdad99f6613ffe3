"""Our own schema: `pipeline.facts.fact.Fact` as JSON. All but `prompt` and `new_answer` may be absent."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from pipeline.facts.fact import Fact, Probe
from pipeline.facts.fields import RowError, identity, mapping, optional_text, sequence, text, texts

_FIELDS = [field.name for field in fields(Fact)]
_PROBE_FIELDS = [field.name for field in fields(Probe)]


def matches(row: dict[str, Any]) -> bool:
    return "prompt" in row and "new_answer" in row


def read(row: dict[str, Any], identifier: str) -> list[Fact]:
    """One fact. A field that the schema lacks is an error: it is nearly always a misspelt one."""
    _check_names(row, _FIELDS, "")
    fact = Fact(
        id=identity(row, "id", identifier),
        prompt=text(row, "prompt"),
        subject=optional_text(row, "subject"),
        old_answers=texts(row, "old_answers"),
        new_answer=text(row, "new_answer"),
        rephrasings=texts(row, "rephrasings"),
        locality=_probes(row, "locality"),
        portability=_probes(row, "portability"),
        year=_year(row.get("year")),
    )
    return [fact]


def _probes(row: dict[str, Any], name: str) -> list[Probe]:
    probes = []
    for i, value in enumerate(sequence(row.get(name), name)):
        item = mapping(value, f"{name}[{i}]")
        _check_names(item, _PROBE_FIELDS, f"{name}[{i}].")
        probes.append(Probe(text(item, "prompt"), texts(item, "answers"), optional_text(item, "kind")))
    return probes


def _year(value: Any) -> int | None:
    # A boolean is an int to Python, but no year.
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise RowError("year: expected a whole number")
    return value


def _check_names(row: dict[str, Any], known: list[str], place: str) -> None:
    for name in row:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise RowError(f"{place}{name}: unknown field" + (f"; did you mean {near[0]}?" if near else ""))
