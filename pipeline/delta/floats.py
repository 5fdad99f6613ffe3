"""Stored numbers as numpy arrays, widened to float32 and narrowed again: importing torch takes as long as subtracting a gigabyte.

numpy has no bfloat16; an array of uint16 is one here, by its bits. No source has a uint16 of its own.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]

BFLOAT16 = np.dtype("<u2")
FLOAT16 = np.dtype("<f2")
NARROW = (BFLOAT16, FLOAT16)

_BLOCK = 1 << 17
"""Elements looked at at a time: what that takes beside them stays small, and in the processor's cache."""


def array_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's dtype for one of a tensor source's."""
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def of_tensor(tensor: torch.Tensor) -> Array:
    """A contiguous tensor's own memory as an array."""
    import torch

    return tensor.view(torch.int16).numpy().view(BFLOAT16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def widen(values: Array, out: Array) -> Array:
    """`values`, of any floating-point dtype, as float32 in `out`."""
    if values.dtype == BFLOAT16:
        bits = out.view(np.uint32)
        np.copyto(bits, values)
        np.left_shift(bits, 16, out=bits)
    elif values.dtype == FLOAT16:
        np.take(_halves(), values.view(np.uint16), out=out, mode="clip")
    else:
        np.copyto(out, values, casting="same_kind")
    return out


def narrow(values: Array, out: Array) -> Array:
    """float32 `values`, each rounded once to the nearest (ties to even) of `out`'s dtype, in `out`."""
    if out.dtype != BFLOAT16:
        np.copyto(out, values, casting="same_kind")
        return out
    bits = values.view(np.uint32)
    odd = np.right_shift(bits, 16)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, 0x7FFF, out=odd)
    np.add(odd, bits, out=odd)
    np.copyto(out, np.right_shift(odd, 16, out=odd), casting="unsafe")
    if values.size and np.isnan(values.max()):
        out[np.isnan(values)] = 0x7FC0
    return out


def narrow_randomly(values: Array, numbers: Array, out: Array) -> Array:
    """float32 `values` rounded up or down to 16 bits, with probabilities that keep their mean, in `out`.

    `numbers`: 16 random bits (uint16) for each value. Values that `out`'s dtype holds exactly stay.
    Probabilities come in steps of 2**-16, rounded up below float16's smallest normal number.
    """
    bits = values.view(np.uint32)
    if out.dtype == BFLOAT16:  # float32 with the last 16 bits cut off: adding 16 random bits carries as often as it should
        np.copyto(out, np.add(bits, numbers) >> 16, casting="unsafe")
        return out
    normal = (np.add(bits, numbers >> 3) & np.uint32(0xFFFFE000)).view(np.float32)  # float16 has 13 mantissa bits less
    steps = np.abs(values) * np.float32(2.0**24)  # below 2**-14 float16 has an even grid, of step 2**-24
    low = np.floor(steps)
    subnormal = np.copysign((low + (numbers < (steps - low) * np.float32(65536.0))) * np.float32(2.0**-24), values)
    np.copyto(out, np.where(np.abs(values) < np.float32(2.0**-14), subnormal, normal), casting="same_kind")
    return out


def count_not_finite(values: Array) -> int:
    """How many of a floating-point array are NaN or infinite."""
    return sum(_count_not_finite(values[begin : begin + _BLOCK]) for begin in range(0, values.size, _BLOCK))


def _count_not_finite(values: Array) -> int:
    finite = (values & 0x7F80) != 0x7F80 if values.dtype == BFLOAT16 else np.isfinite(values)
    return values.size - int(np.count_nonzero(finite))


@cache
def _halves() -> Array:
    """Every float16 as float32: numpy's own conversion is several times slower than looking up."""
    return np.arange(1 << 16, dtype=np.uint16).view(FLOAT16).astype(np.float32)
