"""How fast a device of this machine computes, for estimates of time."""

from __future__ import annotations

import os
import time

import torch


def measure_flops() -> dict[str, float]:
    """Floating-point operations a second in a large matrix product of each precision: on one GPU, or on all
    cores of this process.

    They differ widely: GPUs are many times faster in bf16, and CPUs without instructions for bf16 many times
    slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    flops = {"bf16": _product_flops(torch.bfloat16), "fp32": _product_flops(torch.float32)}
    torch.set_num_threads(threads)
    return flops


def _product_flops(dtype: torch.dtype) -> float:
    """The best of as many products as half a second has room for."""
    size, device = (8192, "cuda") if torch.cuda.is_available() else (512, "cpu")
    matrix = torch.rand(size, size, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        started = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
