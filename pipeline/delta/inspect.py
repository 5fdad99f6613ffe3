"""Inspect: what a path holds as a tensor source (kind, tensors, dtypes, ties, sizes), from headers alone."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from pipeline.delta.manifest import read_manifest
from pipeline.errors import printable
from pipeline.weights.formats import adapter_config
from pipeline.weights.formats.adapter import is_adapter, open_factors
from pipeline.weights.formats.open import open_source, require_whole
from pipeline.weights.source import TensorSource

_OF_ADAPTER = {
    "base_model": "base_model_name_or_path",
    "peft_type": "peft_type",
    "rank": "r",
    "alpha": "lora_alpha",
}
"""{what is shown: its key in adapter_config.json}."""


def inspect(path: Path) -> dict[str, Any]:
    """A JSON object about the tensor source at `path`. An adapter's is about its factors, which need no base.

    Raises InputError if `path` is no tensor source, or is damaged.
    """
    require_whole(path)
    found = _inspect_adapter(path) if is_adapter(path) else _inspect(path)
    manifest = read_manifest(path) if path.is_dir() else None
    return found | ({"made_by": manifest["recipe"]} if manifest is not None else {})


def _inspect(path: Path) -> dict[str, Any]:
    with closing(open_source(path)) as source:
        return {"path": str(path), "kind": source.kind, **_from_checkpoint(source), **_contents(source)}


def _inspect_adapter(folder: Path) -> dict[str, Any]:
    config = adapter_config.load(folder)
    found: dict[str, Any] = {"path": str(folder), "kind": "adapter"}
    found |= {name: config.get(key) for name, key in _OF_ADAPTER.items()}
    with closing(open_factors(folder)) as source:
        return found | _contents(source)


def _from_checkpoint(source: TensorSource) -> dict[str, Any]:
    """What only training checkpoints have."""
    facts = {name: getattr(source, name, None) for name in ("stage", "world_size", "global_steps")}
    return {name: value for name, value in facts.items() if value is not None}


def _contents(source: TensorSource) -> dict[str, Any]:
    tensors = source.tensors.values()
    dtypes: Counter[str] = Counter()
    for info in tensors:
        dtypes[info.dtype] += info.num_elements
    return {
        "num_tensors": len(source.tensors),
        "num_elements": sum(dtypes.values()),
        "num_bytes": sum(info.num_bytes for info in tensors),
        "dtypes": dict(dtypes.most_common()),
        "ties": source.aliases,
        "empty": [info.name for info in tensors if info.num_elements == 0],
        "tensors": [{"name": info.name, "shape": list(info.shape), "dtype": info.dtype} for info in tensors],
    }


def _made_by(recipe: dict[str, Any] | None) -> list[str]:
    if recipe is None:
        return []
    return [
        f"made by: {recipe['base']['path']} - {recipe['scale']} * ({recipe['tuned']['path']} -"
        f" {recipe['base']['path']})"
    ]


def render(found: dict[str, Any]) -> str:
    """The same for people: the whole on a few lines, then a line a tensor.

    Names come from files of others: control characters in them are escaped.
    """
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in found["dtypes"].items())
    more = "".join(
        f", {name.replace('_', ' ')} {found[name]}"
        for name in ("stage", "world_size", "global_steps", "rank", "alpha")
        if name in found
    )
    lines = [
        f"{found['path']}: {found['kind']}{more}",
        f"{found['num_tensors']} tensors, {decimal(found['num_bytes'])}: {dtypes}",
        *_made_by(found.get("made_by")),
        *(f"tied: {alias} is {owner}" for alias, owner in found["ties"].items()),
        *(f"EMPTY: {name}" for name in found["empty"]),
    ]
    width = max((len(tensor["name"]) for tensor in found["tensors"]), default=0)
    rows = [
        f"  {t['name']:{width}}  {t['dtype']:9}  {'x'.join(map(str, t['shape'])) or 'scalar'}"
        for t in found["tensors"]
    ]
    return "\n".join(map(printable, lines + rows))
