"""The learning rate of each optimizer step: warmup, then constant, linear or cosine decay to zero."""

from __future__ import annotations

from math import ceil, cos, pi
from typing import Literal


def learning_rate(
    step: int,
    num_steps: int,
    peak: float,
    schedule: Literal["constant", "linear", "cosine"],
    warmup_ratio: float,
) -> float:
    """The rate of step `step` of `num_steps` (from 0).

    Warmup rises linearly over the first `warmup_ratio` of the steps and reaches `peak` with its last one; no
    step has rate 0.
    """
    num_warmup = ceil(num_steps * warmup_ratio)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / (num_steps - num_warmup)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * (1 + cos(pi * progress)) / 2
    return peak
