"""Subtract: theta' = base - scale * (tuned - base), from any tensor source into a Hugging Face model folder.

    from pipeline.delta.subtract import subtract
    manifest = subtract(Path("original"), Path("tuned"), 0.3, Path("forgotten"))

Run again after a kill it goes on where it was; run again after the end it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.artifact import write_json
from pipeline.delta import diagnostics
from pipeline.delta.arithmetic import Formula, Rounding, is_scale
from pipeline.delta.disk import Io, OutputFile
from pipeline.delta.extras import extras_digests, extras_folder, extras_recipe, extras_warnings
from pipeline.delta.journal import Journal
from pipeline.delta.making import Receipt
from pipeline.delta.plan import Plan, make_plan
from pipeline.delta.sizes import state_sizes
from pipeline.delta.stream import Stream
from pipeline.delta.survival import Survival
from pipeline.errors import InputError
from pipeline.weights.digest import content_digest
from pipeline.weights.open import open_source
from pipeline.weights.safetensors import INDEX
from pipeline.weights.shard import Shard, index_of, parse_size
from pipeline.weights.writer import copy_extras, free_bytes, main_dtype, require_free

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes to write in all."""

ARITHMETIC_VERSION = 4
"""Part of the recipe: to be raised whenever the same inputs would give other bytes, or another digest."""


class Outcome(NamedTuple):
    """What a call came to."""

    state: Literal["written", "found", "waiting"]
    """`found`: it was complete before; `waiting`: this part is done, other parts are not."""
    manifest: dict[str, Any]
    """Of the complete output; empty while waiting."""
    num_waiting: int
    """Shards that other parts have yet to write."""


def subtract(
    base: Path,
    tuned: Path,
    scale: float,
    out: Path,
    *,
    dtype: str | dict[str, str] = "float32",
    rounding: Rounding = "nearest",
    seed: int = 0,
    max_shard_size: str | int = "2GB",
    memory: str | int = "256MiB",
    io: Io = "auto",
    part: tuple[int, int] = (1, 1),
    undoes: Callable[[Receipt], None] | None = None,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Write the model base - scale * (tuned - base) into the folder `out`.

    Args:
        base: The model to subtract from: any tensor source's path. Config and tokenizer are copied from it
            (of a file: from its folder).
        tuned: The fine-tuned model, or an adapter on `base`.
        scale: The paper's lambda.
        out: A new folder, or one that this very command was killed at.
        dtype: How floating-point weights are stored: float32, bfloat16, float16, `same` (each as in the
            base), or a dtype for each tensor by name.
        rounding: To 16 bits: to the nearest value, or stochastic, which keeps the mean.
        seed: Of stochastic rounding.
        max_shard_size: Such as `2GB`.
        memory: The most to use besides Python and its libraries, such as `256MiB`.
        io: `direct` past the page cache, `buffered` through it; `auto`: direct for large files
            where it can be had, but what the cache holds of the inputs is taken from there.
        undoes: Where this takes back an earlier subtraction, so that what survives of the change does not
            matter: called with each shard's receipt before the shard is put into its place, it raises
            InputError if what was read is not what it has to be.
        part: (i, n): do the i-th of n parts (from 1). The one that finishes last completes `out`.
        announce: Called with a line on the sizes before the work, if this call has shards to write.

    Raises:
        InputError: The models do not fit, `out` holds something else, the disk is too full, or a weight is
            not finite.
    """
    if not is_scale(scale):
        raise InputError(f"scale {scale}: must be a finite number, in float32 too")
    for source in (base, tuned):
        if out.resolve().is_relative_to(source.resolve()):
            raise InputError(f"{out}: lies in {source}, which is read; give another --out")
    if not 1 <= part[0] <= part[1]:
        raise InputError(f"part {part[0]}/{part[1]}: must be I/N with I from 1 to N")
    extras = extras_folder(base)  # what may not be copied is said before anything is written
    formula = Formula(scale, rounding, seed)
    sizes = parse_size(max_shard_size), parse_size(memory)
    with (
        closing(open_source(base)) as base_source,
        closing(open_source(tuned, base=base_source)) as tuned_source,
    ):
        plan = make_plan(base_source, tuned_source, dtype, sizes[0])
        stream = Stream(plan, base_source, tuned_source, formula, sizes[1], io, undoes)
        recipe = _recipe(base, tuned, formula, dtype, sizes[0]) | extras_recipe(base, extras)
        if undoes is not None:
            recipe["undoes"] = True
        shards = plan.shards[part[0] - 1 :: part[1]]
        journal = Journal(out)
        manifest = journal.claim(recipe, lambda: require_free(out, _num_bytes(shards)))
        if manifest is not None:
            _require_whole(out, plan, manifest)
            return Outcome("found", manifest, 0)
        missing = [shard for shard in shards if journal.receipt(shard) is None]
        num_bytes = _num_bytes(missing)
        require_free(out, num_bytes)
        if announce is not None and missing:
            announce(
                state_sizes(
                    plan, missing, part, "the base" if undoes is None else "the result", free_bytes(out)
                )
            )
        stream.run(
            missing,
            open_output=lambda shard: OutputFile(out / shard.file_name, shard.num_bytes, io),
            on_whole=journal.record,
            on_progress=lambda num_done: progress(num_done, num_bytes) if progress is not None else None,
        )
        return _finish(journal, plan, recipe, formula, extras)


def _num_bytes(shards: Sequence[Shard]) -> int:
    return sum(shard.num_bytes for shard in shards)


def _require_whole(out: Path, plan: Plan, manifest: dict[str, Any]) -> None:
    """Raises InputError if a finished result has since lost a file, or has another in a shard's place (sizes
    and headers are looked at).
    """
    lost = [
        f"{shard.file_name} {'has another size or header' if (out / shard.file_name).is_file() else 'is missing'}"
        for shard in plan.shards
        if not shard.is_written(out)
    ]
    others = [
        *([INDEX] if len(plan.shards) > 1 else []),
        *manifest.get("extras", {}),
    ]  # older manifests do not note extras
    lost += [f"{name} is missing" for name in others if not (out / name).is_file()]
    if lost:
        raise InputError(
            f"{out}: was finished, but {', '.join(lost)}; restore what is lost, or delete {out} and run again"
        )


def _recipe(
    base: Path, tuned: Path, formula: Formula, dtype: str | dict[str, str], max_shard_bytes: int
) -> dict[str, Any]:
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


def _finish(
    journal: Journal, plan: Plan, recipe: dict[str, Any], formula: Formula, extras: Path | None
) -> Outcome:
    """If every part is done, put index, config and tokenizer beside the shards, then the manifest."""
    receipts = [journal.receipt(shard) for shard in plan.shards]
    num_waiting = receipts.count(None)
    if num_waiting:
        manifest = journal.claim(
            recipe, lambda: None
        )  # another worker may have completed the output just now
        return (
            Outcome("written", manifest, 0) if manifest is not None else Outcome("waiting", {}, num_waiting)
        )
    noted = {name: noted for receipt in receipts if receipt for name, noted in receipt.items()}
    manifest = _manifest(plan, noted, recipe, formula, extras)

    def write_files(folder: Path) -> None:
        _write_files(folder, plan, extras)
        manifest["extras"] = extras_digests(extras, folder)  # known only now: a config is not copied as it is

    journal.commit(manifest, write_files)
    return Outcome("written", manifest, 0)


def _write_files(folder: Path, plan: Plan, extras: Path | None) -> None:
    """What makes shards a model folder: the index, and the base's config and tokenizer where it has them."""
    if len(plan.shards) > 1:
        write_json(folder / INDEX, index_of(plan.shards))
    if extras is not None:
        copy_extras(extras, folder, main_dtype(plan.shards))


def _manifest(
    plan: Plan, receipts: dict[str, Any], recipe: dict[str, Any], formula: Formula, extras: Path | None
) -> dict[str, Any]:
    survivals = {
        name: Survival(**receipts[name]["survival"])
        for name, item in plan.items.items()
        if item.other is not None
    }
    dtype = main_dtype(plan.shards)
    warnings = [
        *diagnostics.warnings(survivals, formula.scale, dtype),
        *extras_warnings(Path(recipe["base"]["path"]), extras),
    ]
    return {
        "tool": f"flearn {_version()}",
        "recipe": recipe,
        "dtype": dtype,
        "num_bytes": plan.num_bytes,
        "survival": diagnostics.total(survivals).figures(formula.scale),
        "warnings": [] if recipe.get("undoes") else warnings,
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
                "inputs": receipts[info.name]["inputs"],
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
