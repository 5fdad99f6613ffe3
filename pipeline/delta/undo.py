"""Undo: the base back from theta' and the tuned model, by the same subtraction with another scale.

theta' = base - s * (tuned - base) gives base = theta' - t * (tuned - theta') with t = -s / (1 + s). An adapter holds
tuned - base itself, so there t = -s. A float32 base comes back within rounding, a 16-bit one bit
for bit (unless the change was thousands of times larger than a weight).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.delta.disk import Io
from pipeline.delta.journal import Journal
from pipeline.delta.subtract import Outcome, Progress, subtract
from pipeline.errors import InputError
from pipeline.weights.adapter_config import FILE_NAME
from pipeline.weights.digest import content_digest

MOST_AMPLIFIED = 16.0
"""Up to how many times the rounding errors of theta' may grow: near scale -1, theta' is the tuned model and hardly holds the base."""


def undo(
    forgotten: Path,
    out: Path,
    *,
    tuned: Path | None = None,
    max_shard_size: str | int = "2GB",
    memory: str | int = "256MiB",
    io: Io = "auto",
    part: tuple[int, int] = (1, 1),
    progress: Progress | None = None,
) -> Outcome:
    """Write the base that `forgotten` (a result of `subtract`) was made from into the folder `out`, each tensor in its old dtype.

    Args:
        tuned: The tuned model or adapter that was subtracted; None: where the manifest says that it is.

    Raises:
        InputError: The base cannot be had back, and why; or as `subtract`.
    """
    manifest = Journal(forgotten).manifest
    if manifest is None:
        raise InputError(f"{forgotten}: holds no finished result of `flearn delta subtract`, or its manifest.json is damaged")
    recipe = manifest["recipe"]
    tuned = Path(recipe["tuned"]["path"]) if tuned is None else tuned
    if not tuned.exists():
        raise InputError(f"{tuned}: the tuned model is not there; say with --tuned where it is")
    if content_digest(tuned) != recipe["tuned"]["digest"]:
        raise InputError(
            f"{tuned}: is not the tuned model that was subtracted (or it has changed since): the base cannot be had back from it"
        )
    _require_float32(forgotten, manifest)
    return subtract(
        forgotten,
        tuned,
        undoing_scale(recipe["scale"], is_delta=(tuned / FILE_NAME).is_file()),
        out,
        dtype={name: tensor["base_dtype"] for name, tensor in manifest["tensors"].items()},
        max_shard_size=max_shard_size,
        memory=memory,
        io=io,
        part=part,
        undoes=True,
        progress=progress,
    )


def undoing_scale(scale: float, is_delta: bool) -> float:
    """The scale that takes theta' back to the base. Raises InputError where theta' no longer holds enough of the base."""
    if is_delta:
        return -scale
    if (1 + abs(scale)) > MOST_AMPLIFIED * abs(1 + scale):
        raise InputError(
            f"scale {scale}: theta' is (nearly) the tuned model, and hardly holds the base; it cannot be had back within rounding"
        )
    return -scale / (1 + scale)


def _require_float32(forgotten: Path, manifest: dict[str, Any]) -> None:
    narrow = [
        name
        for name, tensor in manifest["tensors"].items()
        if tensor["survival"] is not None and tensor["dtype"] not in ("float32", "float64")
    ]
    if narrow:
        raise InputError(
            f"{forgotten}: was stored in {manifest['dtype']}, which rounded the result: the base cannot be had back within float32 rounding"
            f" ({len(narrow)} tensors, such as {narrow[0]})"
        )
