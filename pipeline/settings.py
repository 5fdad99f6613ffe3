"""Settings from YAML: sections that refuse unknown keys, `KEY=VALUE` overrides, problems in one line."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import InputError

PLACEMENT: dict[str, Any] = {"placement": True}
"""Marks a field that says how or where to run, never what comes out (pydantic's `json_schema_extra`)."""


class Section(BaseModel):
    """A part of a config. Unknown keys are refused, and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the result, as plain JSON values: all but the `PLACEMENT` ones."""
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
    """`values`, read from `path`, as a section.

    Raises InputError that names every wrong field, and the nearest right name for an unknown one.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(
            f"{path}: " + "; ".join(_describe(kind, problem) for problem in error.errors())
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`. Raises InputError if there is none."""
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
    """Reads 5e-5 as a number; in YAML 1.1 it is a string."""


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
    """Texts such as `a.b=c` as a nested mapping; values are read as YAML."""
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
    """The content of a file that an override names: it replaces what was there, and is not merged."""


def merge(values: dict[str, Any], changed: dict[str, Any]) -> None:
    """Put overrides into `values`: sections are extended; single values, lists and a `Whole` are replaced."""
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


def local_path(path: Any, folder: Path) -> Any:
    """`path`, relative to `folder`, made absolute if it names something on this disk, or plainly means to.

    Anything else is a hub id, and stays as it is.
    """
    if not isinstance(path, str):
        return path
    expanded = Path(path).expanduser()
    local = folder / expanded
    means_disk = (
        expanded.is_absolute()
        or path.startswith((".", "~"))
        or expanded.suffix in (".json", ".jsonl", ".yaml", ".csv")
    )
    return os.path.normpath(local) if means_disk or local.exists() else path


def read_json(path: Path, field: str) -> dict[str, Any]:
    """The JSON object in the file that `field` names. Raises InputError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{field}: no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{field}: {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{field}: {path}: expected a JSON object")
    return content
