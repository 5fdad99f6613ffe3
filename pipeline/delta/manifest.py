"""The manifest of a subtraction: its recipe, what survived, and whether a file is such a manifest.

The writer's own fields (shards, digests of tensors and extras) are in `pipeline/weights/folder_writer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from pipeline.delta import diagnostics
from pipeline.delta.arithmetic import Formula, Rounding, is_scale
from pipeline.delta.survival import Survival
from pipeline.delta.virtual import Virtual
from pipeline.weights.digest import content_digest
from pipeline.weights.folder_writer import tensors_of
from pipeline.weights.journal import Journal, Kinds, Receipt, has_fields
from pipeline.weights.shard import Shard
from pipeline.weights.source import DTYPE_BYTES, main_dtype

ARITHMETIC_VERSION = 4
"""Part of the recipe: to be raised whenever the same inputs would give other bytes, or another digest."""

_DTYPES = ("same", "float64", "float32", "bfloat16", "float16")
_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))

_MANIFEST: Kinds = {"survival": dict, "warnings": list, "notes": list, "layers": list}
_RECIPE: Kinds = {
    "base": dict,
    "tuned": dict,
    "scale": _NUMBER,
    "rounding": str,
    "dtype": (str, dict),
    "max_shard_bytes": int,
}
_INPUT: Kinds = {"path": str, "digest": str}
_TENSOR: Kinds = {"base_dtype": str, "survival": (dict, type(None))}
_FIGURES: Kinds = {
    "delta_norm": _NUMBER,
    **dict.fromkeys(("share_changed", "projection", "cosine", "norm_ratio"), _MAYBE_NUMBER),
}


def make_recipe(
    base: Path, tuned: Path, formula: Formula, dtype: str | Mapping[str, str], max_shard_bytes: int
) -> dict[str, Any]:
    """Everything that decides the result's bytes. Paths are for the reader; digests decide."""
    recipe = {
        "version": ARITHMETIC_VERSION,
        "base": {"path": str(base.absolute()), "digest": content_digest(base)},
        "tuned": {"path": str(tuned.absolute()), "digest": content_digest(tuned)},
        **asdict(formula),
        "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
    }
    if formula.rounding == "nearest":  # another seed gives the same bytes
        del recipe["seed"]
    return recipe


def describe(
    virtual: Virtual, shards: Sequence[Shard], noted: Receipt, written: Mapping[str, Any]
) -> dict[str, Any]:
    """What the manifest says besides `written`, the writer's fields: survival by tensor, by layer and in
    all.
    """
    scale = virtual.formula.scale
    survivals = {
        name: Survival(**noted[name]["survival"]) for name in virtual.tensors if name in virtual.vector.names
    }
    tensors = {}
    for info in tensors_of(shards):
        survival = survivals.get(info.name)
        tensors[info.name] = written["tensors"][info.name] | {
            "base_dtype": virtual.base.tensors[info.name].dtype,
            "inputs": noted[info.name]["inputs"],
            "survival": None if survival is None else survival.figures(scale),
        }
    return {
        "survival": diagnostics.total(survivals).figures(scale),
        "warnings": virtual.warnings(survivals, main_dtype(tensors_of(shards))),
        "notes": virtual.vector.notes,
        "layers": diagnostics.layers(survivals, scale),
        "tensors": tensors,
    }


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a finished subtraction in `out`, or None: other programs write such files, too."""
    return Journal(out, is_manifest=is_of_subtraction).manifest


def is_of_subtraction(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has what `describe` gives, and a recipe that can be followed."""
    recipe = manifest["recipe"]
    if not (
        has_fields(manifest, _MANIFEST)
        and has_fields(recipe, _RECIPE)
        and has_fields(manifest["survival"], _FIGURES)
    ):
        return False
    dtypes = recipe["dtype"].values() if isinstance(recipe["dtype"], dict) else [recipe["dtype"]]
    if not is_scale(recipe["scale"]) or recipe["rounding"] not in get_args(Rounding):
        return False
    if not all(dtype in _DTYPES for dtype in dtypes) or not all(
        has_fields(recipe[role], _INPUT) for role in ("base", "tuned")
    ):
        return False
    for tensor in manifest["tensors"].values():
        inputs = tensor.get("inputs", {})  # older ones have none
        if (
            not has_fields(tensor, _TENSOR)
            or not isinstance(inputs, dict)
            or tensor["base_dtype"] not in DTYPE_BYTES
        ):
            return False
    return True
