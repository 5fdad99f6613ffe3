"""A data file's raw records with their places: a JSON array, JSON lines, or a Hugging Face data set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError
from pipeline.facts.fields import kind


class Row(NamedTuple):
    """A record, and where it stands: `line 7`, or `record 7 (line 52)` of an array."""

    where: str
    value: dict[str, Any]


class BadRow(NamedTuple):
    """A record that cannot be used, and why."""

    where: str
    reason: str


def read_rows(path: str) -> tuple[list[Row], list[BadRow]]:
    """The records at `path`, and what stands in a record's place but is no JSON object.

    `path` is a file, or a folder or hub id (`owner/name`, `owner/name:split`) that `datasets` can load.
    Raises InputError if there is no such data, or a file is neither a JSON array nor JSON lines.
    """
    if not Path(path).is_file():
        records = _load_data_set(path)
        return _sort([(f"record {i}", value) for i, value in enumerate(records)], [])
    text = _read_text(path)
    start = text.lstrip()[:1]
    if start == "[":
        return _sort(_array(path, text), [])
    if start == "{":
        return _lines(path, text)
    raise InputError(f"{path}: " + ("empty" if not start else "neither a JSON array nor JSON lines"))


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8 JSON") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _sort(values: list[tuple[str, Any]], bad: list[BadRow]) -> tuple[list[Row], list[BadRow]]:
    """Set aside what is no object with named fields."""
    rows: list[Row] = []
    others: list[BadRow] = []
    for where, value in values:
        if isinstance(value, dict):
            rows.append(Row(where, value))
        else:
            others.append(BadRow(where, f"expected an object with named fields, found {kind(value)}"))
    return rows, bad + others


def _lines(path: str, text: str) -> tuple[list[Row], list[BadRow]]:
    values: list[tuple[str, Any]] = []
    bad: list[BadRow] = []
    # Not splitlines(): it also cuts at U+2028 and its like, which JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append((f"line {number}", json.loads(line)))
        except ValueError as error:
            bad.append(BadRow(f"line {number}", f"not JSON: {error}"))
    # One object written over many lines: a sentence about the file, not one "not JSON" for each line.
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
    try:
        return _array_values(text)
    except ValueError as error:
        raise InputError(f"{path}: not a JSON array: {error}") from None


def _array_values(text: str) -> list[tuple[str, Any]]:
    """The values of an array. `json.loads` would be shorter, but does not say on which line each one is."""
    values: list[tuple[str, Any]] = []
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        # Only the newlines since the last value are counted: from the start each time would be quadratic.
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


def _load_data_set(name: str) -> list[dict[str, Any]]:
    """All records of one split (`train` where none is named), without the fields that are null."""
    path, split = _parse(name)
    from datasets import DatasetDict, load_dataset  # seconds of imports, and only this path needs them

    try:
        loaded = load_dataset(path, split=split or None)
    except Exception as error:  # each builder raises its own kind; all mean that the data could not be had
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(
            f"facts.path: {name}: datasets cannot load it ({reason}); give a local JSON file"
        ) from None
    if isinstance(loaded, DatasetDict):
        loaded = loaded[_choose(name, list(loaded))]
    # Arrow gives every record every field, null where it is absent. Schemas are told apart by their fields.
    return [{field: value for field, value in record.items() if value is not None} for record in loaded]


def _parse(name: str) -> tuple[str, str]:
    """A folder or hub id, and the split that it names, or an empty text."""
    if Path(name).is_dir():
        return name, ""
    path, _, split = name.partition(":")
    if Path(name).is_absolute() or path.count("/") != 1:
        raise InputError(
            f"facts.path: {name}: no such file or folder, and not a hub id (owner/name or owner/name:split)"
        )
    return path, split


def _choose(name: str, splits: list[str]) -> str:
    if len(splits) > 1 and "train" not in splits:
        raise InputError(
            f"facts.path: {name} has the splits {', '.join(splits)}; name one, as in {name}:{splits[0]}"
        )
    return "train" if "train" in splits else splits[0]
