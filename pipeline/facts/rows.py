"""A data file's raw records with their places: a JSON array, JSON lines, or a data set that `datasets`
loads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError
from pipeline.facts.fields import kind
from pipeline.facts.hub import load_records


class Row(NamedTuple):
    """A record, and where it stands: `line 7`, or `record 7 (line 52)` of an array."""

    where: str
    value: dict[str, Any]


class BadRow(NamedTuple):
    """A record that cannot be used, and why."""

    where: str
    reason: str


def read_rows(path: str) -> tuple[list[Row], list[BadRow]]:
    """All records of a file, a folder or hub id that `datasets` can load; and the ones that are no JSON
    objects.

    Raises InputError if there is no such file, it is no text, or neither a JSON array nor JSON lines.
    """
    if not Path(path).is_file():
        return _sort([(f"record {i}", value) for i, value in enumerate(load_records(path))], [])
    text = _read_text(path)
    start = text.lstrip()[:1]
    if start == "[":
        return _sort(_array(path, text), [])
    if start == "{":
        return _lines(path, text)
    raise InputError(f"{path}: " + ("empty" if not start else "neither a JSON array nor JSON lines"))


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8 JSON") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _sort(values: list[tuple[str, Any]], bad: list[BadRow]) -> tuple[list[Row], list[BadRow]]:
    """Set aside what is no object with named fields."""
    rows = [Row(where, value) for where, value in values if isinstance(value, dict)]
    others = [
        BadRow(where, f"expected an object with named fields, found {kind(v)}")
        for where, v in values
        if not isinstance(v, dict)
    ]
    return rows, bad + others


def _lines(path: str, text: str) -> tuple[list[Row], list[BadRow]]:
    values: list[tuple[str, Any]] = []
    bad: list[BadRow] = []
    # Not splitlines(): JSON text may hold U+2028 and its like, which are no ends of a line here.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append((f"line {number}", json.loads(line)))
        except ValueError as error:
            bad.append(BadRow(f"line {number}", f"not JSON: {error}"))
    if not values and _is_json(text):
        raise InputError(f"{path}: one JSON object; expected an array of records, or one record a line")
    return _sort(values, bad)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def _array(path: str, text: str) -> list[tuple[str, Any]]:
    """The values of an array, read one by one, so that each one's line is known."""
    try:
        return _array_values(text)
    except ValueError as error:
        raise InputError(f"{path}: not a JSON array: {error}") from None


def _array_values(text: str) -> list[tuple[str, Any]]:
    values: list[tuple[str, Any]] = []
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        value, end = _DECODER.raw_decode(text, position)
        values.append((f"record {len(values)} (line {line})", value))
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    if _skip(text, position + 1) != len(text):
        raise json.JSONDecodeError("Extra data after the array", text, position + 1)
    return values


def _skip(text: str, position: int) -> int:
    blanks = _BLANKS.match(text, position)
    assert blanks is not None
    return blanks.end()
