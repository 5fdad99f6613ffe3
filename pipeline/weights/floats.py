"""Stored numbers as numpy arrays, widened to float32 and narrowed again, without torch.

Importing torch takes as long as subtracting a gigabyte. numpy has no bfloat16: an array of uint16 is one
here, by its bits. No source has a uint16 of its own.
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

_NO_SIGN = np.uint32(0x7FFFFFFF)
_EXPONENT = np.uint32(0x7F800000)
_FLOAT16_NORMAL = np.uint32(0x38800000)
"""2**-14, float16's smallest normal number, as float32's bits."""
_FLOAT16_OVERFLOW = np.uint32(0x477FF000)
"""65520, from where on a number is infinite in float16, as float32's bits. (Infinity's and NaN's are
larger.)
"""

_BLOCK = 1 << 17
"""Elements looked at at a time: what that takes beside them stays small, and in the processor's cache."""


def array_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's dtype for one of a tensor source's."""
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def of_tensor(tensor: torch.Tensor) -> Array:
    """A contiguous tensor's own memory as an array."""
    import torch

    is_bfloat16 = tensor.dtype == torch.bfloat16
    return tensor.view(torch.int16).numpy().view(BFLOAT16) if is_bfloat16 else tensor.numpy()


def as_tensor(values: Array, dtype: str) -> torch.Tensor:
    """What a source read of a tensor of `dtype`, as a torch tensor over the same memory."""
    import torch

    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


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


def narrow(values: Array, out: Array) -> None:
    """Round float32 `values` to the nearest of `out`'s dtype (ties to even), once, into `out` and in
    place.
    """
    if out.dtype == BFLOAT16:
        _narrow_to_bfloat16(values, out)
        return
    if out.dtype == FLOAT16:
        _narrow_to_float16(values, out)
        return
    np.copyto(out, values, casting="same_kind")


def _narrow_to_bfloat16(values: Array, out: Array) -> None:
    nan = np.isnan(values) if values.size and np.isnan(values.max()) else None
    bits = values.view(np.uint32)
    high = np.right_shift(bits, 16)
    np.bitwise_and(high, 1, out=high)
    np.add(high, 0x7FFF, out=high)
    np.add(bits, high, out=bits)
    _cut_to_bfloat16(bits, high, out)
    if nan is not None:
        values[nan], out[nan] = np.nan, 0x7FC0


def _cut_to_bfloat16(bits: Array, scratch: Array, out: Array) -> None:
    """Clear the last 16 of 32 `bits`; the first 16 go to `out`."""
    np.bitwise_and(bits, np.uint32(0xFFFF0000), out=bits)
    np.copyto(out, np.right_shift(bits, 16, out=scratch), casting="unsafe")


def _narrow_to_float16(values: Array, out: Array) -> None:
    """The nearest float16, bit for bit what numpy's own conversion gives, in half its time."""
    bits = values.view(np.uint32)
    size = bits & _NO_SIGN
    if size.max(initial=0) >= _FLOAT16_OVERFLOW:
        np.copyto(out, values, casting="same_kind")
        widen(out, values)
        return
    # A float16's last place is 2**-10 of its power of two, and 2**-24 below 2**-14: the last place, too, of
    # float32 numbers around 2**13 times that power. So adding this rounds to it, and the sum's last bits
    # count places.
    power = bits & _EXPONENT
    np.maximum(power, _FLOAT16_NORMAL, out=power)
    # 1 << 11 makes up for the exponents' offsets, below in 16 bits.
    np.add(power, (13 << 23) + (1 << 11), out=power)
    total = power.view(np.float32) + size.view(np.float32)
    np.bitwise_xor(bits, size, out=bits)
    np.subtract(total, power.view(np.float32), out=size.view(np.float32))
    half = total.view(np.uint32)
    np.add(half, np.right_shift(half, 13, out=power), out=half)
    np.bitwise_or(half, np.right_shift(bits, 16, out=power), out=half)
    np.bitwise_or(bits, size, out=bits)
    np.copyto(out.view(np.uint16), half, casting="unsafe")


def narrow_randomly(values: Array, numbers: Array, out: Array) -> None:
    """Round float32 `values` up or down to 16 bits, into `out` and in place, so that their mean is kept.

    `numbers`: 16 random bits (uint16) for each value. Values that `out`'s dtype holds exactly stay.
    Probabilities come in steps of 2**-16, rounded up below float16's smallest normal number.
    """
    bits = values.view(np.uint32)
    # bfloat16 is float32 with the last 16 bits cut off: adding 16 random bits carries as often as it should.
    if out.dtype == BFLOAT16:
        _cut_to_bfloat16(np.add(bits, numbers, out=bits), np.empty_like(bits), out)
        return
    steps = np.abs(values)
    is_small = steps < np.float32(2.0**-14)
    # Below 2**-14 float16 has an even grid, of step 2**-24.
    np.multiply(steps, np.float32(2.0**24), out=steps)
    small = np.floor(steps)
    np.subtract(steps, small, out=steps)
    np.multiply(steps, np.float32(65536.0), out=steps)
    np.add(small, numbers < steps, out=small)
    np.multiply(small, np.float32(2.0**-24), out=small)
    np.copysign(small, values, out=small)
    np.add(bits, numbers >> 3, out=bits)  # elsewhere it has 13 mantissa bits less than float32
    np.bitwise_and(bits, np.uint32(0xFFFFE000), out=bits)
    np.copyto(values, small, where=is_small)
    _narrow_to_float16(values, out)


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
