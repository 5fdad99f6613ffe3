"""What a machine has, and how much of it one rank may use."""

from __future__ import annotations

from typing import Literal, NamedTuple

from launch.doctor.machine import State
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
    """Floating-point operations a second of one rank, on a GPU or its share of the cores, in a large matrix
    product of each precision.

    None: not measured.
    """
    on_cluster: bool = False
    """Whether a scheduler runs the steps: side by side where none needs the other, and an evaluation on one
    rank, not on all.
    """
    num_gpus: int | None = None
    """How many GPUs there can be; None: as many as are asked for, or none at all."""
    rank_bytes: int | None = None
    """What a scheduler gives each rank of the host's memory; None: the ranks share it."""

    def limit(self, cluster: Cluster) -> int:
        """Bytes that one of the cluster's ranks may use."""
        return (
            self.own_bytes if self.own_bytes is not None else self.host_bytes * cluster.nodes // cluster.ranks
        )

    @property
    def own_bytes(self) -> int | None:
        """The memory of each rank, however many there are; None where they share the host's."""
        return self.device_bytes if self.device_bytes is not None else self.rank_bytes

    def rate(self, precision: Literal["bf16", "fp32"], ranks: int) -> float:
        """Operations a second of `ranks` ranks; infinite where their speed was not measured."""
        return self.flops[precision] * _EFFICIENCY * ranks if self.flops is not None else float("inf")


def state_of(needed: int, available: int) -> State:
    """Whether `needed` bytes fit: estimates are rough, so a close fit is a warning."""
    return "fail" if needed > available else "warn" if not fits(needed, available) else "ok"


def fits(needed: int, available: int) -> bool:
    """Whether there is room to spare."""
    return needed <= _TIGHT * available
