"""Subtract: write theta' = base - scale * (tuned - base), from any tensor source, as a Hugging Face model
folder.

    from pipeline.delta.subtract import subtract
    manifest = subtract(Path("original"), Path("tuned"), 0.3, Path("forgotten")).manifest

Run again after a kill it goes on where it was; run again after the end it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from pipeline.context import Progress
from pipeline.delta.arithmetic import Rounding
from pipeline.delta.manifest import describe, is_of_subtraction, make_recipe
from pipeline.delta.virtual import Virtual, open_virtual
from pipeline.errors import InputError
from pipeline.weights.extras import extras_folder, extras_recipe, extras_warnings, render_extras
from pipeline.weights.folder_writer import (
    Content,
    Outcome,
    free_bytes,
    num_bytes_of,
    tensors_of,
    write_folder,
)
from pipeline.weights.io.direct import Io
from pipeline.weights.journal import Part, Receipt
from pipeline.weights.shard import Shard, parse_size, plan_shards
from pipeline.weights.source import main_dtype


def subtract(
    base: Path,
    tuned: Path,
    scale: float,
    out: Path,
    *,
    dtype: str = "float32",
    rounding: Rounding = "nearest",
    seed: int = 0,
    max_shard_size: str | int = "2GB",
    memory: str | int = "256MiB",
    io: Io = "auto",
    part: Part = (0, 1),
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Write the model base - scale * (tuned - base) into the folder `out`.

    Args:
        base: The model to subtract from: any tensor source's path. Config and tokenizer are copied from it,
            or, if it is a single file, from its folder.
        tuned: The fine-tuned model, or an adapter on `base`.
        scale: The paper's lambda.
        out: A new folder, or one that this very command was killed at.
        dtype: How floating-point weights are stored: float32, bfloat16, float16, or `same` (each as in the
            base).
        rounding: To 16 bits: to the nearest value, or stochastic, which keeps the mean.
        seed: Of stochastic rounding.
        max_shard_size: Such as `2GB`.
        memory: The most to use besides Python and its libraries, such as `256MiB`.
        io: `direct` past the page cache, `buffered` through it. `auto` is direct for large files where it can
            be had, but takes from the page cache what lies there of the inputs.
        part: (i, n): do the i-th of n parts (from 0). The one that finishes last completes `out`.
        announce: Called with a line on the sizes before the work, if this call has shards to write.
        progress: Moved on by the bytes that are written.

    Raises:
        InputError: The models do not fit, `out` holds something else, the disk is too full, or a weight is
            not finite.
    """
    extras = extras_folder(base)  # what may not be copied is said before anything is written
    max_shard_bytes = parse_size(max_shard_size)
    require_outside(out, base, tuned)
    require_part(part)
    with closing(open_virtual(base, tuned, scale, dtype, rounding, seed, io)) as virtual:
        recipe = make_recipe(base, tuned, virtual.formula, dtype, max_shard_bytes)
        return write_virtual(
            virtual,
            out,
            recipe | extras_recipe(base, extras),
            extras,
            extras_warnings(base, extras),
            memory=memory,
            io=io,
            part=part,
            announce=announce,
            progress=progress,
        )


def require_outside(out: Path, *sources: Path) -> None:
    """Raises InputError if the result would be written into what is read."""
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise InputError(f"{out}: lies in {source}, which is read; give another --out")


def require_part(part: Part) -> None:
    """Raises InputError if there is no such part."""
    if not 0 <= part[0] < part[1]:
        raise InputError(f"part {part[0] + 1}/{part[1]}: must be I/N with I from 1 to N")


def write_virtual(
    virtual: Virtual,
    out: Path,
    recipe: Mapping[str, Any],
    extras: Path | None,
    warnings: Sequence[str],
    *,
    memory: str | int,
    io: Io,
    part: Part,
    announce: Callable[[str], None] | None,
    progress: Progress | None,
    base_name: str = "the base",
) -> Outcome:
    """Write `virtual` into the folder `out`.

    Args:
        recipe: All that decides the bytes; `max_shard_bytes` is one of its fields.
        extras: The folder whose config and tokenizer go beside the weights, if any.
        warnings: What the manifest warns of, besides what survives of the subtraction.
        base_name: What `virtual.base` is called in the line on the sizes.

    Others, and errors, as `subtract`.
    """
    # A plan of names and sizes alone: workers on other machines make the same one.
    shards = plan_shards(virtual.tensors.values(), recipe["max_shard_bytes"])
    content = Content(shards, render_extras(extras, main_dtype(virtual.tensors.values())), recipe)

    def describe_result(noted: Receipt, manifest: Mapping[str, Any]) -> dict[str, Any]:
        fields = describe(virtual, shards, noted, manifest)
        return fields | {"warnings": [*fields["warnings"], *warnings]}

    def announce_sizes(missing: Sequence[Shard]) -> None:
        if announce is not None:
            announce(_sizes(virtual, shards, missing, part, base_name, free_bytes(out)))

    return write_folder(
        virtual,
        out,
        content,
        describe=describe_result,
        is_manifest=is_of_subtraction,
        memory_bytes=parse_size(memory),
        io=io,
        part=part,
        announce=announce_sizes,
        progress=progress,
    )


def _sizes(
    virtual: Virtual, shards: Sequence[Shard], missing: Sequence[Shard], part: Part, base_name: str, free: int
) -> str:
    """What is about to be written, in a line for people.

    `writes 27.0 GB in 14 shards (float32; the base is bfloat16, 13.5 GB); 68.2 GB are free`.
    """
    base = Shard("", tuple(virtual.base.tensors.values()))
    said = f"{len(shards)} shard{'' if len(shards) == 1 else 's'}"
    if len(missing) < len(shards):
        said = f"{len(missing)} of {said}, {decimal(num_bytes_of(shards))} in all"
    share = f"part {part[0] + 1}/{part[1]} " if part[1] > 1 else ""
    return (
        f"{share}writes {decimal(num_bytes_of(missing))} in {said}"
        f" ({main_dtype(tensors_of(shards))}; {base_name} is {main_dtype(base.tensors)},"
        f" {decimal(base.num_bytes)});"
        f" {decimal(free)} are free"
    )
