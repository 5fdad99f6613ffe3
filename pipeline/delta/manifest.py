"""What a finished result's manifest and a shard's receipt hold, as far as it is read again: other programs
write such files, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, get_args

from pipeline.delta.arithmetic import Rounding, is_scale
from pipeline.delta.survival import Survival
from pipeline.weights.source import DTYPE_BYTES

_Kinds = Mapping[str, type | tuple[type, ...]]

_DTYPES = ("same", "float64", "float32", "bfloat16", "float16")

_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))
_MANIFEST: _Kinds = {
    "recipe": dict,
    "dtype": str,
    "num_bytes": int,
    "survival": dict,
    "warnings": list,
    "notes": list,
    "layers": list,
    "shards": list,
    "tensors": dict,
}
_RECIPE: _Kinds = {
    "base": dict,
    "tuned": dict,
    "scale": _NUMBER,
    "rounding": str,
    "dtype": (str, dict),
    "max_shard_bytes": int,
}
_INPUT: _Kinds = {"path": str, "digest": str}
_SHARD: _Kinds = {"file": str, "num_bytes": int}
_TENSOR: _Kinds = {
    "file": str,
    "dtype": str,
    "base_dtype": str,
    "blake3": str,
    "survival": (dict, type(None)),
}
_FIGURES: _Kinds = {
    "delta_norm": _NUMBER,
    **dict.fromkeys(("share_changed", "projection", "cosine", "norm_ratio"), _MAYBE_NUMBER),
}
_NOTED: _Kinds = {"blake3": str, "survival": dict, "inputs": dict}
_SUMS: _Kinds = {field.name: _NUMBER for field in fields(Survival)}


def is_manifest(value: Any) -> bool:
    """Whether `value` (of a JSON file) is the manifest of a finished subtraction."""
    if (
        not _has(value, _MANIFEST)
        or not _has(value["recipe"], _RECIPE)
        or not _has(value["survival"], _FIGURES)
    ):
        return False
    extras = value.get("extras", {})  # older ones have none
    if not isinstance(extras, dict) or not all(isinstance(digest, str) for digest in extras.values()):
        return False
    recipe = value["recipe"]
    dtypes = recipe["dtype"].values() if isinstance(recipe["dtype"], dict) else [recipe["dtype"]]
    if (
        not is_scale(recipe["scale"])
        or recipe["rounding"] not in get_args(Rounding)
        or not all(dtype in _DTYPES for dtype in dtypes)
    ):
        return False
    inputs = [recipe["base"], recipe["tuned"]]
    shards, tensors = value["shards"], value["tensors"].values()
    if not (all(_has(one, _INPUT) for one in inputs) and all(_has(one, _SHARD) for one in shards)):
        return False
    files = {shard["file"] for shard in shards}
    if not all(
        _has(one, _TENSOR) and isinstance(one.get("inputs", {}), dict) for one in tensors
    ):  # older ones have no inputs
        return False
    return bool(files) and all(one["file"] in files and one["base_dtype"] in DTYPE_BYTES for one in tensors)


def is_receipt(value: Any, names: Collection[str] | None = None) -> bool:
    """Whether `value` is the receipt of a finished shard (of the tensors `names`)."""
    if not isinstance(value, dict) or (names is not None and value.keys() != set(names)):
        return False
    return all(_has(noted, _NOTED) and _has(noted["survival"], _SUMS) for noted in value.values())


def _has(value: Any, kinds: _Kinds) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name, _ABSENT), kind) for name, kind in kinds.items()
    )


_ABSENT = object()
