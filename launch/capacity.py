"""What a machine has, and how much of it one rank may use."""

from __future__ import annotations

from typing import Literal, NamedTuple

from launch.machine import State
from pipeline.config import Cluster

_EFFICIENCY = 0.4
"""Share of a plain matrix product's speed that training reaches."""
_TIGHT = 0.85


class Capacity(NamedTuple):
    """What a machine has. `device_bytes` is one GPU's memory, or None where the ranks share the host's."""

    device_bytes: int | None
    host_bytes: int
    disk_bytes: int
    flops: dict[str, float] | None
    """Floating-point operations a second of one rank's device, in a large matrix product of each precision; None: not measured."""
    evaluating_ranks: int
    """Ranks that share an evaluation: all of them on this machine, one on a cluster."""

    def limit(self, cluster: Cluster, ranks: int | None = None) -> int:
        """Bytes that one of `ranks` ranks (the cluster's, if None) may use."""
        if self.device_bytes is not None:
            return self.device_bytes
        return self.host_bytes * cluster.nodes // (ranks or cluster.ranks)

    def rate(self, precision: Literal["bf16", "fp32"], ranks: int) -> float:
        """Operations a second of `ranks` ranks: a GPU each, or together the cores, whose speed was measured together.

        Infinite where it was not measured.
        """
        if self.flops is None:
            return float("inf")
        return self.flops[precision] * _EFFICIENCY * (ranks if self.device_bytes is not None else 1)


def state(needed: int, available: int) -> State:
    """Whether `needed` bytes fit: estimates are rough, so a close fit is a warning."""
    return "fail" if needed > available else "warn" if not fits(needed, available) else "ok"


def fits(needed: int, available: int) -> bool:
    """Whether there is room to spare."""
    return needed <= _TIGHT * available
