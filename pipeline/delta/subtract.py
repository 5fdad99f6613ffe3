"""Subtract: theta' = base - scale * (tuned - base), from any tensor source into a Hugging Face model folder.

    from pipeline.delta.subtract import subtract
    manifest = subtract(Path("original"), Path("tuned"), 0.3, Path("forgotten"))

Run again after a kill it goes on where it was; run again after the end it does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import content_digest, write_json
from pipeline.delta import diagnostics
from pipeline.delta.arithmetic import Formula, Rounding
from pipeline.delta.journal import Journal
from pipeline.delta.plan import Plan, make_plan
from pipeline.delta.stream import write_shard
from pipeline.delta.survival import Survival
from pipeline.errors import InputError
from pipeline.weights.open import open_source
from pipeline.weights.safetensors import INDEX
from pipeline.weights.shard import index_of, parse_size
from pipeline.weights.writer import copy_extras, main_dtype, require_free

Dtype = Literal["float32", "bfloat16", "float16", "same"]
Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes to write in all."""

ARITHMETIC_VERSION = 1
"""Part of the recipe: to be raised whenever the same inputs would give other bytes."""


def subtract(
    base: Path,
    tuned: Path,
    scale: float,
    out: Path,
    *,
    dtype: Dtype = "float32",
    rounding: Rounding = "nearest",
    seed: int = 0,
    max_shard_size: str | int = "2GB",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model base - scale * (tuned - base) into the folder `out`, and return its manifest.

    Args:
        base: The model to subtract from: any tensor source's path. Config and tokenizer are copied from it.
        tuned: The fine-tuned model, or an adapter on `base`.
        scale: The paper's lambda.
        out: A new folder, or one that this very command was killed at.
        dtype: How floating-point weights are stored; `same`: each as in the base.
        rounding: To 16 bits: to the nearest value, or stochastic, which keeps the mean.
        seed: Of stochastic rounding.
        max_shard_size: Such as `2GB`.

    Raises:
        InputError: The models do not fit, `out` holds something else, the disk is too full, or a weight is not finite.
    """
    if not math.isfinite(scale):
        raise InputError(f"scale {scale}: must be a finite number")
    formula = Formula(scale, rounding, seed)
    max_shard_bytes = parse_size(max_shard_size)
    with closing(open_source(base)) as base_source, closing(open_source(tuned, base=base_source)) as tuned_source:
        plan = make_plan(base_source, tuned_source, dtype, max_shard_bytes)
        recipe = _recipe(base, tuned, formula, dtype, max_shard_bytes)
        journal = Journal(out)
        manifest = journal.claim(recipe)
        if manifest is not None:
            return manifest
        missing = [shard for shard in plan.shards if journal.receipt(shard) is None]
        num_bytes = sum(shard.num_bytes for shard in missing)
        require_free(out, num_bytes)
        num_done = 0

        def report(more: int) -> None:
            nonlocal num_done
            num_done += more
            if progress is not None:
                progress(num_done, num_bytes)

        for shard in missing:
            journal.record(shard, write_shard(plan, shard, base_source, tuned_source, formula, out, report))
        return _finish(journal, plan, recipe, formula)


def _recipe(base: Path, tuned: Path, formula: Formula, dtype: str, max_shard_bytes: int) -> dict[str, Any]:
    """Everything that decides the output's bytes. Paths are for the reader; digests decide."""
    recipe = {
        "version": ARITHMETIC_VERSION,
        "base": {"path": str(base.absolute()), "digest": content_digest(base)},
        "tuned": {"path": str(tuned.absolute()), "digest": content_digest(tuned)},
        **asdict(formula),
        "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
    }
    if formula.rounding == "nearest":
        del recipe["seed"]
    return recipe


def _finish(journal: Journal, plan: Plan, recipe: dict[str, Any], formula: Formula) -> dict[str, Any]:
    """Put index, config and tokenizer beside the shards, then the manifest."""
    receipts = {}
    for shard in plan.shards:
        receipt = journal.receipt(shard)
        assert receipt is not None, shard
        receipts.update(receipt["tensors"])
    if len(plan.shards) > 1:
        write_json(journal.out / INDEX, index_of(plan.shards))
    base = Path(recipe["base"]["path"])
    if base.is_dir():
        copy_extras(base, journal.out, main_dtype(plan.shards))
    manifest = _manifest(plan, receipts, recipe, formula)
    journal.commit(manifest)
    return manifest


def _manifest(plan: Plan, receipts: dict[str, Any], recipe: dict[str, Any], formula: Formula) -> dict[str, Any]:
    survivals = {name: Survival(**receipts[name]["survival"]) for name, item in plan.items.items() if item.other is not None}
    dtype = main_dtype(plan.shards)
    return {
        "tool": f"flearn {_version()}",
        "recipe": recipe,
        "dtype": dtype,
        "num_bytes": plan.num_bytes,
        "survival": diagnostics.total(survivals).figures(formula.scale),
        "warnings": diagnostics.warnings(survivals, formula.scale, dtype),
        "notes": plan.notes,
        "layers": diagnostics.layers(survivals, formula.scale),
        "shards": [{"file": shard.file_name, "num_bytes": shard.num_bytes} for shard in plan.shards],
        "tensors": {
            info.name: {
                "file": shard.file_name,
                "dtype": info.dtype,
                "base_dtype": plan.items[info.name].base.dtype,
                "shape": list(info.shape),
                "blake3": receipts[info.name]["blake3"],
                "survival": survivals[info.name].figures(formula.scale) if info.name in survivals else None,
            }
            for shard in plan.shards
            for info in shard.tensors
        },
    }


def _version() -> str:
    try:
        return version("flearn")
    except PackageNotFoundError:
        return "(not installed)"
