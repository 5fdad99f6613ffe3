"""Typed access to a record's fields: anything else than its schema says is a RowError."""

from __future__ import annotations

from typing import Any

from pipeline.facts.fact import Probe


class RowError(ValueError):
    """A record is malformed; the message is the reason, without the place."""


def text(row: dict[str, Any], name: str) -> str:
    """The text in a required field, without blanks around it; may be empty. Raises RowError."""
    if row.get(name) is None:
        raise RowError(f"no field {name!r}")
    return _text(row[name], name)


def optional_text(row: dict[str, Any], name: str) -> str:
    """Like `text`, but empty where the field is absent or null (Arrow tables hold null for absent)."""
    return "" if row.get(name) is None else _text(row[name], name)


def texts(row: dict[str, Any], name: str) -> list[str]:
    """The non-empty texts of a field: a text, a list, lists of aliases, or absent. Raises RowError."""
    value = row.get(name)
    return [] if value is None else _flat(value, name)


def identity(row: dict[str, Any], name: str, default: str) -> str:
    """A record's own id, a number or a text, or `default`."""
    value = row.get(name)
    return str(value) if isinstance(value, (int, str)) and str(value).strip() else default


def mapping(value: Any, name: str) -> dict[str, Any]:
    """`value`, if it is an object with named fields. Raises RowError."""
    if not isinstance(value, dict):
        raise RowError(f"{name}: expected an object with named fields, found {kind(value)}")
    return value


def sequence(value: Any, name: str) -> list[Any]:
    """`value` if it is a list, an empty one for null. Raises RowError."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(f"{name}: expected a list, found {kind(value)}")
    return value


def probes(value: Any, name: str, prompt: str, answers: str, label: str) -> list[Probe]:
    """The probes in a list of objects: one for each text in an object's field `prompt`. Raises RowError."""
    found = []
    for i, value_of_item in enumerate(sequence(value, name)):
        item = mapping(value_of_item, f"{name}[{i}]")
        found += [Probe(question, texts(item, answers), label) for question in texts(item, prompt)]
    return found


_KINDS = {
    "NoneType": "null",
    "str": "text",
    "dict": "an object",
    "list": "a list",
    "bool": "a boolean",
    "int": "a number",
    "float": "a number",
}


def kind(value: Any) -> str:
    """JSON's name for the type of `value`."""
    return _KINDS.get(type(value).__name__, type(value).__name__)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name}: expected text, found {kind(value)}")
    # JSON can spell half of a surrogate pair. No tokenizer takes it, and no UTF-8 file can hold it.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{name}: holds half of a surrogate pair, which is no character") from None
    return value.strip()


def _flat(value: Any, name: str) -> list[str]:
    if isinstance(value, list):
        return [item for part in value for item in _flat(part, name)]
    found = _text(value, name)
    return [found] if found else []
