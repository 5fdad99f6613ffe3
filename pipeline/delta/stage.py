"""The `forget` stage: theta' = original - scale * (tuned - original), straight from what the fine-tuning
left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.config import Forget
from pipeline.context import Context, Preempted, log
from pipeline.delta.parts import note_done
from pipeline.delta.subtract import Progress, subtract


def run(
    section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context
) -> dict[str, Any] | None:
    """Write the forgotten model to `out`/model, and say how much of the subtraction survived.

    A fully tuned model is read from its ZeRO checkpoint, an adapter as it is: no consolidated copy is made.
    Where several processes share the work (`context.part`), the one that finishes last has the facts, the
    others None. Raises Preempted if this process was asked to stop: the next call goes on after the shards
    that are there.
    """
    _heed(context)
    forget = Forget.model_validate(section["forget"])
    assert isinstance(forget.scale, float)
    with _progress(context) as progress:
        outcome = subtract(
            inputs["base"].model_folder,
            Path(inputs["tuned"].model_path),
            forget.scale,
            out / "model",
            dtype=forget.dtype,
            rounding=forget.rounding,
            seed=section["seed"],
            max_shard_size=forget.max_shard_size,
            part=(1, 1) if context.part is None else (context.part[0] + 1, context.part[1]),
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
    """Stop if this process was asked to. It does not ask its fellows: they wait for it, or work on other
    parts.
    """
    if context.stop:
        raise Preempted("forget: stopped; the shards that are done are kept")


@contextmanager
def _progress(context: Context) -> Iterator[Progress]:
    """A bar that starts once the sizes are known, and an ear for requests to stop as long as something is
    left to do.
    """
    with ExitStack() as stack:
        bar = None
        shown = 0

        def report(num_done: int, num_bytes: int) -> None:
            nonlocal bar, shown
            if num_done < num_bytes:
                _heed(context)
            if bar is None:
                bar = stack.enter_context(context.progress("forget", num_bytes >> 20, "MiB"))
            bar.advance((num_done >> 20) - shown)
            shown = num_done >> 20

        yield report
