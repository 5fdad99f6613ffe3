"""The arithmetic of forgetting on slices of a tensor: theta' = base - scale * (tuned - base), in float32.

The order of operations is fixed: d = tuned - base, s = scale * d, theta' = base - s, each rounded once to the nearest
float32 (never fused), scale itself rounded to float32. Then, once, to the stored dtype. Each element depends on its own
inputs alone, so that any way of slicing, on any number of workers, gives the same bytes. An adapter gives d directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import numpy as np
import torch

from pipeline.delta.survival import Survival

Rounding = Literal["nearest", "stochastic"]

BLOCK_ELEMENTS = 1 << 17
"""Elements computed at a time, so that intermediate results (28 bytes an element) stay in the processor's cache."""

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Formula:
    """What is computed for every weight: `scale` is the paper's lambda; `seed` matters to stochastic rounding alone."""

    scale: float
    rounding: Rounding = "nearest"
    seed: int = 0


class Arithmetic:
    """One thread's scratch memory, and what is computed in it. `out` tensors are written to; all tensors are 1-D."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._base, self._delta, self._result = torch.empty(3, BLOCK_ELEMENTS, dtype=torch.float32)
        self._one, self._two = torch.empty(2, BLOCK_ELEMENTS, dtype=torch.float64)

    def subtract(self, name: str, start: int, base: torch.Tensor, other: torch.Tensor, out: torch.Tensor, is_delta: bool) -> Survival:
        """Elements [start, start + len) of the tensor `name`: theta' to `out`, and what survived in it.

        `other` holds the tuned values, or with `is_delta` the difference tuned - base itself.
        """
        survival = Survival()
        for begin in range(0, base.numel(), BLOCK_ELEMENTS):
            block = slice(begin, begin + BLOCK_ELEMENTS)
            survival.add(self._subtract_block(name, start + begin, base[block], other[block], out[block], is_delta))
        return survival

    def _subtract_block(
        self, name: str, start: int, base: torch.Tensor, other: torch.Tensor, out: torch.Tensor, is_delta: bool
    ) -> Survival:
        count = base.numel()
        base32, delta, result = self._base[:count].copy_(base), self._delta[:count].copy_(other), self._result[:count]
        if not is_delta:
            torch.sub(delta, base32, out=delta)
        torch.mul(delta, self.formula.scale, out=result)
        torch.sub(base32, result, out=result)
        self._store(name, start, result, out)
        needs_rounding = out.dtype in _NARROW and base.dtype != out.dtype
        return self._measure(base32, delta, base32.to(out.dtype) if needs_rounding else base32, out)

    def keep(self, name: str, start: int, base: torch.Tensor, out: torch.Tensor) -> None:
        """Elements of a tensor that nothing is subtracted from: `base` to `out`, in `out`'s dtype."""
        if base.dtype == out.dtype:
            out.copy_(base)
            return
        for begin in range(0, base.numel(), BLOCK_ELEMENTS):
            values = base[begin : begin + BLOCK_ELEMENTS]
            self._store(name, start + begin, self._result[: values.numel()].copy_(values), out[begin : begin + BLOCK_ELEMENTS])

    def _store(self, name: str, start: int, values: torch.Tensor, out: torch.Tensor) -> None:
        if self.formula.rounding == "stochastic" and out.dtype in _NARROW:
            out.copy_(round_stochastically(values, out.dtype, draws(self.formula.seed, name, start, values.numel())))
        else:
            out.copy_(values)

    def _measure(self, base32: torch.Tensor, delta: torch.Tensor, reference: torch.Tensor, out: torch.Tensor) -> Survival:
        """`reference` is the base in `out`'s dtype, from which the stored change is taken."""
        count = base32.numel()
        change = torch.sub(self._result[:count].copy_(out), reference, out=self._result[:count])
        wide_delta, wide = self._one[:count].copy_(delta), self._two[:count].copy_(change)
        return Survival(
            num_elements=count,
            num_changed=int(np.count_nonzero(change.numpy() != 0)),
            delta_square=float(torch.dot(wide_delta, wide_delta)),
            delta_change=float(torch.dot(wide_delta, wide)),
            change_square=float(torch.dot(wide, wide)),
            base_square=float(torch.dot(wide.copy_(base32), wide)),
        )


def draws(seed: int, name: str, start: int, count: int) -> torch.Tensor:
    """Random 16-bit numbers (int32) of the elements [start, start + count) of the tensor `name`.

    Element i has the i-th 16 bits of the Philox stream whose key is made of seed and name, whoever asks for it.
    """
    key = np.frombuffer(sha256(f"{seed}\0{name}".encode()).digest()[:16], dtype="<u8")
    first = start // 16  # one step of Philox' counter gives 4 words of 64 bits
    num_words = -(-(start + count) // 16) * 4 - first * 4
    words = np.random.Philox(key=key, counter=[first, 0, 0, 0]).random_raw(num_words)
    numbers = words.astype("<u8", copy=False).view("<u2")[start - first * 16 :][:count]
    return torch.from_numpy(numbers.astype(np.int32))


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, numbers: torch.Tensor) -> torch.Tensor:
    """Round float32 `values` up or down to `dtype` (bfloat16 or float16), with probabilities that keep their mean.

    `numbers`: int32 of 16 random bits, one for each value. Values that `dtype` holds exactly stay.
    """
    bits = values.contiguous().view(torch.int32)
    if dtype == torch.bfloat16:  # float32 with the last 16 bits cut off: adding 16 random bits carries as often as it should
        return torch.add(bits, numbers).bitwise_and_(-1 << 16).view(torch.float32).to(dtype)
    normal = torch.add(bits, numbers >> 3).bitwise_and_(-1 << 13).view(torch.float32)  # float16 has 13 mantissa bits less
    steps = values * 2.0**24  # below 2**-14 float16 has an even grid, of step 2**-24
    low = steps.floor()
    subnormal = (low + (numbers < (steps - low) * 65536.0)) * 2.0**-24
    return torch.where(values.abs() < 2.0**-14, subnormal, normal).to(dtype)
