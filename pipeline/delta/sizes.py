"""The sizes of what is about to be written, in a line for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.filesize import decimal

from pipeline.delta.plan import Plan
from pipeline.weights.shard import Shard
from pipeline.weights.writer import main_dtype


def state_sizes(
    plan: Plan, missing: Sequence[Shard], part: tuple[int, int], base: str, free_bytes: int
) -> str:
    """`writes 27.0 GB in 14 shards (float32; the base is bfloat16, 13.5 GB); 68.2 GB are free`.

    Args:
        missing: The shards of `plan` that this call writes; others are there, or another part's.
        part: Which of how many parts.
        base: What the base is called: it may be the result of another subtraction.
    """
    source = Shard("", tuple(item.base for item in plan.items.values()))
    num_shards = len(plan.shards)
    shards = f"{num_shards} shard{'' if num_shards == 1 else 's'}"
    if len(missing) < num_shards:
        shards = f"{len(missing)} of {shards}, {decimal(plan.num_bytes)} in all"
    return (
        (f"part {part[0]}/{part[1]} " if part[1] > 1 else "")
        + f"writes {decimal(sum(shard.num_bytes for shard in missing))} in {shards}"
        + f" ({main_dtype(plan.shards)}; {base} is {main_dtype([source])}, {decimal(source.num_bytes)}); {decimal(free_bytes)} are free"
    )
