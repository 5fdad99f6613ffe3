"""Typed access to one record's fields, with the reason in words where a field is not what its schema says."""

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
    """The non-empty texts of a field that is a text, a list of texts, a list of lists of texts (aliases), or
    absent.
    """
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
    """The probes of a list of objects whose fields `prompt` (a text, or a list of texts) and `answers` are so
    named.
    """
    items = [mapping(item, f"{name}[{i}]") for i, item in enumerate(sequence(value, name))]
    return [
        Probe(question, texts(item, answers), label) for item in items for question in texts(item, prompt)
    ]


def kind(value: Any) -> str:
    """JSON's name for the type of `value`."""
    names = {
        "NoneType": "null",
        "str": "text",
        "dict": "an object",
        "list": "a list",
        "bool": "a boolean",
        "int": "a number",
        "float": "a number",
    }
    return names.get(type(value).__name__, type(value).__name__)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name}: expected text, found {kind(value)}")
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
