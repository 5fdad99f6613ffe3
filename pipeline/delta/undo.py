"""Undo: the base back from theta' and the tuned model, by the same subtraction with another scale.

theta' = base - s * (tuned - base) gives base = theta' - t * (tuned - theta') with t = -s / (1 + s). An
adapter holds tuned - base itself, so there t = -s. A float32 base comes back within rounding, a 16-bit one
bit for bit but for weights that are 0 or many thousand times smaller than their change. So it is not the
result that is compared: theta' and the tuned model are, as they are read, with the digests that were noted
when theta' was made, before a shard is put into its place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.delta.disk import Io
from pipeline.delta.journal import Journal
from pipeline.delta.making import Receipt
from pipeline.delta.subtract import Outcome, Progress, subtract
from pipeline.errors import InputError
from pipeline.weights.adapter_config import FILE_NAME
from pipeline.weights.digest import content_digest
from pipeline.weights.open import open_source

MOST_AMPLIFIED = 16.0
"""Up to how many times the rounding errors of theta' may grow: near scale -1, theta' is the tuned model and
hardly holds the base.
"""


def undo(
    forgotten: Path,
    out: Path,
    *,
    tuned: Path | None = None,
    max_shard_size: str | int = "2GB",
    memory: str | int = "256MiB",
    io: Io = "auto",
    part: tuple[int, int] = (1, 1),
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Write the base that `forgotten` (a result of `subtract`) was made from into the folder `out`, each
    tensor in its old dtype.

    Args:
        tuned: The tuned model or adapter that was subtracted; None: where the manifest says that it is.

    Raises:
        InputError: The base cannot be had back, and why; or as `subtract`.
    """
    manifest = Journal(forgotten).manifest
    if manifest is None:
        raise InputError(
            f"{forgotten}: holds no finished result of `flearn delta subtract`, or its manifest.json is damaged"
        )
    _require_float32(forgotten, manifest)
    _require_noted_inputs(
        forgotten, manifest
    )  # before any digest is compared: an older flearn's may be another's
    recipe = manifest["recipe"]
    tuned = Path(recipe["tuned"]["path"]) if tuned is None else tuned
    if not tuned.exists():
        raise InputError(f"{tuned}: the tuned model is not there; say with --tuned where it is")
    if content_digest(tuned) != recipe["tuned"]["digest"]:
        raise InputError(
            f"{tuned}: is not the tuned model that was subtracted (or it has changed since): the base cannot be had back from it"
        )
    _require_tensors(forgotten, manifest)
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
        undoes=lambda receipt: _require_inputs(forgotten, tuned, out, manifest["tensors"], receipt),
        announce=announce,
        progress=progress,
    )


def undoing_scale(scale: float, is_delta: bool) -> float:
    """The scale that takes theta' back to the base. Raises InputError where theta' no longer holds enough of
    the base.
    """
    if is_delta:
        return -scale
    if (1 + abs(scale)) > MOST_AMPLIFIED * abs(1 + scale):
        raise InputError(
            f"scale {scale}: theta' is (nearly) the tuned model, and hardly holds the base; it cannot be had back within rounding"
        )
    return -scale / (1 + scale)


def say_how_exact(forgotten: Path, back: Path) -> str:
    """How many tensors of `back`, which `undo` made of `forgotten`, are the base's bit for bit."""
    result, base = Journal(forgotten).manifest, Journal(back).manifest
    assert result is not None and base is not None
    num_equal = sum(
        tensor["blake3"] == result["tensors"][name]["inputs"]["base"]
        for name, tensor in base["tensors"].items()
    )
    num_tensors = len(base["tensors"])
    return f"{num_equal} of {num_tensors} tensors are the base's bit for bit" + (
        "" if num_equal == num_tensors else ", the others within float32 rounding"
    )


def _require_inputs(
    forgotten: Path, tuned: Path, out: Path, tensors: dict[str, Any], receipt: Receipt
) -> None:
    """Raises InputError if the tensors of `receipt` were made of other bytes than those that were written,
    and subtracted.

    By then `out` is begun, and holds whatever shards were finished before.
    """
    advice = f"delete {out} before trying with other inputs"
    for name, noted in receipt.items():
        read, right = noted["inputs"], tensors[name]
        if read["base"] != right["blake3"]:
            raise InputError(
                f"{forgotten}: {name}: its bytes are not those that were written, so the base cannot be had back; `flearn delta verify"
                f" {forgotten}` says what differs; {advice}"
            )
        if read.get("tuned") != right["inputs"].get("tuned"):
            raise InputError(
                f"{tuned}: {name} has other values than when it was subtracted; give the tuned model as it was then; {advice}"
            )


def _require_tensors(forgotten: Path, manifest: dict[str, Any]) -> None:
    """Raises InputError unless the result has the manifest's tensors."""
    with closing(open_source(forgotten)) as source:
        differing = sorted(source.tensors.keys() ^ manifest["tensors"].keys())
    if differing:
        raise InputError(
            f"{forgotten}: {differing[0]} is not in both its manifest.json and its weights: the result is damaged"
        )


def _require_noted_inputs(forgotten: Path, manifest: dict[str, Any]) -> None:
    """Raises InputError unless the manifest says what each tensor was made of."""
    if not all("base" in tensor.get("inputs", {}) for tensor in manifest["tensors"].values()):
        raise InputError(
            f"{forgotten}: was made by an older flearn, which did not note what it read: whether the base is right could not be told."
            " Make it again"
        )


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
