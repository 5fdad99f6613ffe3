"""The stream: shards written slice by slice from the base and the tuned source, never a whole tensor in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from pipeline.delta.arithmetic import Arithmetic, Formula
from pipeline.delta.plan import Item, Plan
from pipeline.delta.survival import Survival
from pipeline.errors import InputError
from pipeline.weights.shard import Shard, ShardWriter
from pipeline.weights.source import TensorSource

SLICE_ELEMENTS = 1 << 20

Report = Callable[[int], None]


def write_shard(
    plan: Plan, shard: Shard, base: TensorSource, tuned: TensorSource, formula: Formula, out: Path, report: Report
) -> dict[str, Any]:
    """Write `shard` into the folder `out`; its receipt: blake3 of the bytes, and the survival sums, of every tensor."""
    arithmetic = Arithmetic(formula)
    tensors = {}
    with ShardWriter(out / shard.file_name, shard.tensors) as writer:
        for info in shard.tensors:
            digest, survival = blake3(), Survival()
            for start in range(0, info.num_elements, SLICE_ELEMENTS):
                stop = min(start + SLICE_ELEMENTS, info.num_elements)
                values = _compute(plan.items[info.name], base, tuned, start, stop, arithmetic, survival)
                digest.update(values.view(torch.uint8).numpy().data)
                writer.write_slice(info.name, start, values)
                report(values.nbytes)
            if not survival.is_finite:
                raise InputError(f"{info.name}: holds NaN or infinity in the base, in the tuned model or in the result")
            tensors[info.name] = {"blake3": digest.hexdigest(), "survival": vars(survival)}
    return {"tensors": tensors}


def _compute(
    item: Item, base: TensorSource, tuned: TensorSource, start: int, stop: int, arithmetic: Arithmetic, survival: Survival
) -> torch.Tensor:
    values = base.read(item.info.name, start, stop)
    if item.other is None and item.info.dtype == item.base.dtype:
        return values
    out = torch.empty(stop - start, dtype=getattr(torch, item.info.dtype))
    if item.other is None:
        arithmetic.cast(item.info.name, start, values, out)
        return out
    read_delta = getattr(tuned, "delta", None)
    other = tuned.read(item.other, start, stop) if read_delta is None else read_delta(item.other, start, stop)
    survival.add(arithmetic.subtract(item.info.name, start, values, other, out, read_delta is not None))
    return out
