"""Reading a YAML file of settings: sections that refuse unknown keys, `KEY=VALUE` overrides, and problems
told in one line.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import InputError

PLACEMENT: dict[str, Any] = {"placement": True}
"""Marks a field that says how or where to run, never what comes out (pydantic's `json_schema_extra`)."""


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the result, as plain JSON values; `placement` fields left out."""
        return {
            name: _plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("placement"))
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.recipe()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


AnySection = TypeVar("AnySection", bound=Section)


def check(kind: type[AnySection], values: dict[str, Any], path: Path) -> AnySection:
    """`values`, read from `path`, as a section. Raises InputError naming every wrong field, with the nearest
    right name.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(
            f"{path}: " + "; ".join(_describe(kind, problem) for problem in error.errors())
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`. Raises InputError if it is absent or holds something else."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    return values


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.1 reads 5e-5 as a string; experiments are full of such numbers."""


_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _parse_override(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"--set {text}: expected KEY=VALUE, for example --set forget.scale=0.5")
    try:
        return key, yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"--set {text}: {' '.join(str(error).split())}") from None


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`a.b=c` texts as a nested mapping; the values are read as YAML."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, value = _parse_override(override)
        _assign(values, key, value)
    return values


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {key}: {parent} was already set to a single value")
    values[last] = value


class Whole(dict[str, Any]):
    """A mapping that an override gives as a whole (the content of a file), to replace what was there."""


def merge(values: dict[str, Any], changed: dict[str, Any]) -> None:
    """Overrides replace single values and extend sections; a list, or what a file holds (`Whole`), replaces
    what was there.
    """
    for key, value in changed.items():
        if isinstance(value, dict) and not isinstance(value, Whole) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def _describe(kind: type[Section], problem: Any) -> str:
    location = [
        part
        for part in problem["loc"]
        if isinstance(part, int) or not part.startswith(("function-", "dict[", "list["))
    ]
    field = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _known_keys(kind, location[:-1]), n=1)
        parents = "".join(f"{part}." for part in location[:-1])
        return f"{field}: unknown key" + (f"; did you mean {parents}{near[0]}?" if near else "")
    if problem["type"] == "missing":
        return f"{field}: missing; this field is required"
    message = problem["msg"].removeprefix("Value error, ")
    given = json.dumps(problem["input"], default=str)
    shown = f" (given: {given})" if field and len(given) < 80 else ""
    return f"{field}: {message}{shown}" if field else message


def _known_keys(section: type[Section], location: list[Any]) -> list[str]:
    for part in location:
        field = section.model_fields.get(part)
        if field is None:
            return []
        inner = [
            c
            for c in (field.annotation, *get_args(field.annotation))
            if isinstance(c, type) and issubclass(c, Section)
        ]
        if not inner:
            return []
        section = inner[0]
    return list(section.model_fields)
