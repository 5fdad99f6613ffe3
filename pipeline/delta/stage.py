"""The `forget` stage: theta' = original - scale * (tuned - original), from what the fine-tuning left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.config import Forget
from pipeline.context import Context, Preempted, Progress, log
from pipeline.delta.subtract import subtract
from pipeline.weights.journal import note_done


def run(
    section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context
) -> dict[str, Any] | None:
    """Write the forgotten model to `out`/model, and say how much of the subtraction survived.

    A fully tuned model is read from its ZeRO checkpoint, an adapter as it is: no consolidated copy is made.
    Where several processes share the work (`context.part`), the one that finishes last returns the result,
    the others None. Raises Preempted if this process was asked to stop: the next call goes on after the
    shards that are there.
    """
    _heed(context)
    forget = Forget.model_validate(section["forget"])
    assert isinstance(forget.scale, float)
    with _Heeding(context) as progress:
        outcome = subtract(
            inputs["base"].model_folder,
            Path(inputs["tuned"].model_path),
            forget.scale,
            out / "model",
            dtype=forget.dtype,
            rounding=forget.rounding,
            seed=section["seed"],
            max_shard_size=forget.max_shard_size,
            part=context.part or (0, 1),
            announce=lambda line: log.info("forget: %s", line),
            progress=progress,
        )
    if context.part is not None:
        note_done(out, context.part)
    if outcome.state == "waiting":
        return None
    manifest = outcome.manifest
    for warning in manifest["warnings"]:
        log.warning("forget: %s", warning)
    return {
        "model": "model",
        "model_kind": "folder",
        "scale": forget.scale,
        "dtype": manifest["dtype"],
        "rounding": forget.rounding,
        "bytes": manifest["num_bytes"],
        "survival": manifest["survival"],
        "layers": manifest["layers"],
        "warnings": manifest["warnings"],
    }


def _heed(context: Context) -> None:
    """Stop if this process was asked to. It does not ask its fellows, which wait for it or do other parts."""
    if context.stop:
        raise Preempted("forget: stopped; the shards that are done are kept")


class _Heeding(Progress):
    """A bar that listens for requests to stop, as long as something is left to do."""

    def __init__(self, context: Context) -> None:
        super().__init__("forget", "bytes", shown=context.is_main)
        self._context = context
        self._num_left = 0

    def start(self, total: int) -> None:
        super().start(total)
        self._num_left = total

    def advance(self, amount: int = 1, note: str = "") -> None:
        super().advance(amount, note)
        self._num_left -= amount
        if self._num_left > 0:
            _heed(self._context)
