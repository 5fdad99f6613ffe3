"""The arithmetic of forgetting on slices of a tensor: theta' = base - scale * (tuned - base), in float32.

The order of operations is fixed: d = tuned - base, s = scale * d, theta' = base - s. Each is rounded once to
the nearest float32 (never fused), and so is scale itself; then, once, to the stored dtype. An adapter gives d
directly. Each element depends on its own inputs alone: any slicing, on any number of workers, gives the same
bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, Protocol

import numpy as np

from pipeline.delta.survival import Survival
from pipeline.errors import InputError
from pipeline.weights.floats import NARROW, Array, narrow, narrow_randomly, widen

Rounding = Literal["nearest", "stochastic"]

BLOCK_ELEMENTS = 1 << 18
"""Elements computed at a time.

Fewer, and threads wait for each other: only one runs Python at a time, between two operations. More, and the
intermediate results (16 bytes an element) leave the processor's caches.
"""

_ROW = 1 << 10
_SMALLEST, _LARGEST = 1e-24, 1e38
"""Between them float32 sums lose nothing: 2**18 products too small for it add up to less than 1e-32."""


def is_scale(value: float) -> bool:
    """Whether float32, in which a scale is used, has such a finite number."""
    return abs(value) <= float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Formula:
    """What is computed for every weight.

    `scale` is the paper's lambda. `seed` matters to stochastic rounding alone.
    """

    scale: float
    rounding: Rounding = "nearest"
    seed: int = 0


class Change(Protocol):
    """A slice of a task vector, from which its elements are computed block by block."""

    @property
    def read(self) -> Mapping[str, Array]:
        """What was read for it, by whose it is: the stored values, as they are."""
        ...

    def compute(self, block: slice, base: Array, out: Array) -> Array:
        """The change of the elements `block` of the slice, float32, in `out` or elsewhere.

        `base`: the base's values of that block, float32. `out`: 1-D, float32, of as many elements.
        """
        ...


class Arithmetic:
    """One thread's scratch memory, and what is computed in it.

    Arrays are 1-D, as in `floats`; `out` is written to.
    """

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._scale = np.float32(formula.scale)
        self._base, self._delta, self._result = np.empty((3, BLOCK_ELEMENTS), np.float32)

    @np.errstate(all="ignore")
    def subtract(
        self, name: str, start: int, base: Array, change: Change, out: Array, measured: bool = True
    ) -> Survival | None:
        """Elements [start, start + len) of the tensor `name`: theta' to `out`, and what survived in it.

        Not `measured` saves a fifth of the time, and returns None.
        Raises InputError if a weight that is read, or the result as it is stored, is not a finite number.
        """
        survival, is_finite = Survival(), True
        for begin in range(0, base.size, BLOCK_ELEMENTS):
            block = slice(begin, begin + BLOCK_ELEMENTS)
            base32, delta, result = self._subtract(name, start, block, base, change, out)
            if measured:
                rounded_to = None if base.dtype == out.dtype else out.dtype
                survival.add(_measure(base32, delta, result, rounded_to))
            else:  # NaN and infinity go through all that is computed, with a scale of 0 as NaN
                is_finite = is_finite and bool(np.isfinite(result).all())
        if not (survival.is_finite and is_finite):
            raise InputError(
                f"{name}: NaN or infinity in the base, in the tuned model,"
                " or after rounding to the stored dtype"
            )
        return survival if measured else None

    def _subtract(
        self, name: str, start: int, block: slice, base: Array, change: Change, out: Array
    ) -> tuple[Array, Array, Array]:
        """One block to `out`; returns the base, the change and the stored result, all float32 and scratch."""
        count = base[block].size
        base32, result = widen(base[block], self._base[:count]), self._result[:count]
        delta = change.compute(block, base32, self._delta[:count])
        np.multiply(delta, self._scale, out=result)
        np.subtract(base32, result, out=result)
        self._store(name, start + block.start, result, out[block])
        # float32 would cut a float64 base short, and -0 - 0 * (-x) is 0.
        if self._scale == 0 and base.dtype == out.dtype:
            np.copyto(out[block], base[block])
        return base32, delta, result

    @np.errstate(all="ignore")
    def keep(self, name: str, start: int, base: Array, out: Array) -> None:
        """Elements of a tensor that nothing is subtracted from: `base` to `out`, in `out`'s dtype."""
        if base.dtype == out.dtype:
            np.copyto(out, base)
            return
        for begin in range(0, base.size, BLOCK_ELEMENTS):
            values = base[begin : begin + BLOCK_ELEMENTS]
            wide = widen(values, self._result[: values.size])
            self._store(name, start + begin, wide, out[begin : begin + BLOCK_ELEMENTS])

    def _store(self, name: str, start: int, values: Array, out: Array) -> None:
        """Round `values` to `out`'s dtype, there and in place."""
        if self.formula.rounding == "stochastic" and out.dtype in NARROW:
            narrow_randomly(values, draws(self.formula.seed, name, start, values.size), out)
        else:
            narrow(values, out)


def _measure(base: Array, delta: Array, stored: Array, rounded_to: np.dtype[Any] | None) -> Survival:
    """What `stored` keeps of `delta`, against the base (`rounded_to` a dtype).

    All are float32; `base` and `stored` are written over.
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
    """The inner product of float32 arrays, to about 6 digits.

    Where float32 has no room for the products, all of it is computed in float64.
    """
    product = _dot_by_rows(one, two)
    if _SMALLEST < abs(product) < _LARGEST or not (one.any() and two.any()):
        return product
    return _dot_by_rows(one.astype(np.float64), two.astype(np.float64))


def _dot_by_rows(one: Array, two: Array) -> float:
    """The inner product, row by row, the rows' sums added up in float64.

    For longer rows BLAS would make threads of its own.
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
