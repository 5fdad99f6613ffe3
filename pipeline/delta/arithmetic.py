"""The arithmetic of forgetting on slices of a tensor: theta' = base - scale * (tuned - base), in float32.

The order of operations is fixed: d = tuned - base, s = scale * d, theta' = base - s, each rounded once to the
nearest float32 (never fused), scale itself rounded to float32. Then, once, to the stored dtype. Each element
depends on its own inputs alone, so that any way of slicing, on any number of workers, gives the same bytes.
An adapter gives d directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np

from pipeline.delta.floats import NARROW, Array, narrow, narrow_randomly, widen
from pipeline.delta.survival import Survival

Rounding = Literal["nearest", "stochastic"]

BLOCK_ELEMENTS = 1 << 18
"""Elements computed at a time: few enough for intermediate results (16 bytes an element) to stay in the
processor's caches, and so many that threads, which meet between two operations (only one runs Python at a
time), hardly ever wait for each other.
"""

_ROW = 1 << 10
_SMALLEST, _LARGEST = 1e-24, 1e38
"""Between them float32 products lose nothing: 2**18 of them that are too small for it add up to less than
1e-32.
"""


def is_scale(value: float) -> bool:
    """Whether float32, in which a scale is used, has such a finite number."""
    return abs(value) <= float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Formula:
    """What is computed for every weight: `scale` is the paper's lambda; `seed` matters to stochastic rounding
    alone.
    """

    scale: float
    rounding: Rounding = "nearest"
    seed: int = 0


class Arithmetic:
    """One thread's scratch memory, and what is computed in it. Arrays are 1-D, as in `floats`; `out` is
    written to.
    """

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._scale = np.float32(formula.scale)
        self._base, self._delta, self._result = np.empty((3, BLOCK_ELEMENTS), np.float32)

    @np.errstate(all="ignore")
    def subtract(
        self, name: str, start: int, base: Array, other: Array, out: Array, is_delta: bool
    ) -> Survival:
        """Elements [start, start + len) of the tensor `name`: theta' to `out`, and what survived in it.

        `other` holds the tuned values, or with `is_delta` the difference tuned - base itself.
        """
        survival = Survival()
        for begin in range(0, base.size, BLOCK_ELEMENTS):
            block = slice(begin, begin + BLOCK_ELEMENTS)
            survival.add(
                self._subtract_block(name, start + begin, base[block], other[block], out[block], is_delta)
            )
        return survival

    def _subtract_block(
        self, name: str, start: int, base: Array, other: Array, out: Array, is_delta: bool
    ) -> Survival:
        count = base.size
        base32, delta, result = (
            widen(base, self._base[:count]),
            widen(other, self._delta[:count]),
            self._result[:count],
        )
        if not is_delta:
            np.subtract(delta, base32, out=delta)
        np.multiply(delta, self._scale, out=result)
        np.subtract(base32, result, out=result)
        self._store(name, start, result, out)
        if (
            self._scale == 0 and base.dtype == out.dtype
        ):  # float32 would cut a float64 base short, and -0 - 0 * (-x) is 0
            np.copyto(out, base)
        return _measure(base32, delta, result, None if base.dtype == out.dtype else out.dtype)

    @np.errstate(all="ignore")
    def keep(self, name: str, start: int, base: Array, out: Array) -> None:
        """Elements of a tensor that nothing is subtracted from: `base` to `out`, in `out`'s dtype."""
        if base.dtype == out.dtype:
            np.copyto(out, base)
            return
        for begin in range(0, base.size, BLOCK_ELEMENTS):
            values = base[begin : begin + BLOCK_ELEMENTS]
            self._store(
                name,
                start + begin,
                widen(values, self._result[: values.size]),
                out[begin : begin + BLOCK_ELEMENTS],
            )

    def _store(self, name: str, start: int, values: Array, out: Array) -> None:
        """Round `values` to `out`'s dtype, there and in place."""
        if self.formula.rounding == "stochastic" and out.dtype in NARROW:
            narrow_randomly(values, draws(self.formula.seed, name, start, values.size), out)
        else:
            narrow(values, out)


def _measure(base: Array, delta: Array, stored: Array, rounded_to: np.dtype[Any] | None) -> Survival:
    """What `stored` keeps of `delta`, against the base (`rounded_to` a dtype). All are float32; the first and
    the last are written over.
    """
    base_square = _dot(base, base)
    if rounded_to in NARROW:
        narrow(base, np.empty(base.size, rounded_to))
    change = np.subtract(stored, base, out=stored)
    return Survival(
        num_elements=base.size,
        num_changed=int(np.count_nonzero(change != 0)),
        base_square=base_square,
        delta_square=_dot(delta, delta),
        change_square=_dot(change, change),
        delta_change=_dot(delta, change),
    )


def _dot(one: Array, two: Array) -> float:
    """The inner product of float32 arrays, to about 6 digits; all in float64 where float32 has no room for
    the products.
    """
    product = _dot_by_rows(one, two)
    if _SMALLEST < abs(product) < _LARGEST or not (one.any() and two.any()):
        return product
    return _dot_by_rows(one.astype(np.float64), two.astype(np.float64))


def _dot_by_rows(one: Array, two: Array) -> float:
    """The inner product: BLAS would make threads of its own for longer rows. Their sums are added up in
    float64.
    """
    whole = one.size // _ROW * _ROW
    rows = np.vecdot(one[:whole].reshape(-1, _ROW), two[:whole].reshape(-1, _ROW))
    return float(rows.sum(dtype=np.float64) + np.dot(one[whole:], two[whole:]))


def draws(seed: int, name: str, start: int, count: int) -> Array:
    """Random 16-bit numbers (uint16) of the elements [start, start + count) of the tensor `name`.

    Element i has the i-th 16 bits of the Philox stream whose key is made of seed and name, whoever asks for
    it.
    """
    key = np.frombuffer(sha256(f"{seed}\0{name}".encode()).digest()[:16], dtype="<u8")
    first = start // 16  # one step of Philox' counter gives 4 words of 64 bits
    num_words = -(-(start + count) // 16) * 4 - first * 4
    words = np.random.Philox(key=key, counter=[first, 0, 0, 0]).random_raw(num_words)
    return words.astype("<u8", copy=False).view("<u2")[start - first * 16 :][:count]
