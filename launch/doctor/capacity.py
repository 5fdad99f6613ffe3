"""What a machine has: memory, disk and speed, and how much of them one rank may use."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

from launch.doctor.machine import State
from pipeline.config import Cluster

if TYPE_CHECKING:
    import torch

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
    product of each precision. None: not measured.
    """
    on_cluster: bool = False
    """Whether a scheduler runs the steps: side by side where none needs the other, and an evaluation on one
    rank, not on all.
    """
    rank_bytes: int | None = None
    """What a scheduler gives each rank of the host's memory; None: the ranks share it."""

    @property
    def own_bytes(self) -> int | None:
        """The memory of each rank, however many there are; None where they share the host's."""
        return self.device_bytes if self.device_bytes is not None else self.rank_bytes

    def limit(self, cluster: Cluster) -> int:
        """Bytes that one of the cluster's ranks may use."""
        if self.own_bytes is not None:
            return self.own_bytes
        return self.host_bytes * cluster.nodes // cluster.ranks

    def rate(self, precision: Literal["bf16", "fp32"], ranks: int) -> float:
        """Operations a second of `ranks` ranks; infinite where their speed was not measured."""
        return self.flops[precision] * _EFFICIENCY * ranks if self.flops is not None else float("inf")


def state_of(needed: int, available: int) -> State:
    """Whether `needed` bytes fit: estimates are rough, so a close fit is a warning."""
    if needed > available:
        return "fail"
    return "ok" if needed <= _TIGHT * available else "warn"


def measure_flops() -> dict[str, float]:
    """Floating-point operations a second in a large matrix product of each precision: of one GPU, or of all
    cores of this process.

    They differ widely: GPUs are many times faster in bf16, CPUs without instructions for it many times
    slower.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    flops = {"bf16": _product_flops(torch.bfloat16), "fp32": _product_flops(torch.float32)}
    torch.set_num_threads(threads)
    return flops


def _product_flops(dtype: torch.dtype) -> float:
    """The best of as many products as half a second has room for."""
    import torch

    size, device = (8192, "cuda") if torch.cuda.is_available() else (512, "cpu")
    matrix = torch.rand(size, size, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        started = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
