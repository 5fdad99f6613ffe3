"""What a stored tensor holds instead of what it should.

It may be the base's values, another scale's result, or a few wrong elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf, isclose, sqrt

import numpy as np
from blake3 import blake3

from pipeline.delta.arithmetic import Arithmetic, Formula
from pipeline.delta.virtual import Virtual
from pipeline.weights.floats import NARROW, Array, array_dtype, widen
from pipeline.weights.slices import SliceReader
from pipeline.weights.source import TensorInfo

_SLICE_ELEMENTS = 1 << 18
"""Less than a chunk's worth, so that a slice of a virtual model is computed at once."""
_SAME_DIRECTION = 0.99
"""Cosine from which a stored change counts as another scale of the same change."""


@np.errstate(all="ignore")
def explain(name: str, stored: SliceReader, virtual: Virtual) -> str:
    """In what way the tensor `name` of `stored` differs from that of `virtual`, which has its shape and
    dtype.
    """
    num_elements, scale = virtual.tensors[name].num_elements, virtual.formula.scale
    num_wrong, first, not_finite = 0, "", ""
    equals_base, only_signs = True, True
    delta_square = change_square = product = 0.0
    for start, found, right, kept, delta in _slices(name, stored, virtual):
        found_values, right_values, kept_values = _wide(found), _wide(right), _wide(kept)
        wrong = np.flatnonzero(_bits(found) != _bits(right))
        num_wrong += wrong.size
        first = first or _named(start, wrong[:1], found, right)
        not_finite = not_finite or _named(start, wrong[~np.isfinite(found_values[wrong])][:1], found, right)
        only_signs = only_signs and not found_values[wrong].any() and not right_values[wrong].any()
        equals_base = equals_base and np.array_equal(found_values, kept_values)
        change = found_values - kept_values
        delta_square += float(delta.dot(delta))
        change_square += float(change.dot(change))
        product += float(delta.dot(change))
    if only_signs:
        return f"{num_wrong} of {num_elements} elements differ, in the sign of zero alone; {first}"
    if equals_base:
        return "holds the base's values: nothing was subtracted"
    is_along = delta_square > 0 and _SAME_DIRECTION * sqrt(delta_square * change_square) <= abs(product) < inf
    if is_along and not isclose(-product / delta_square, scale, rel_tol=1e-3):
        return f"was made with scale {-product / delta_square:.4g} instead of {scale:.4g}"
    return f"{num_wrong} of {num_elements} elements differ; {not_finite or first}"


def changed_inputs(virtual: Virtual, info: TensorInfo, noted: Mapping[str, str]) -> list[str]:
    """Which inputs of the tensor `info` are not those that it was made of, by their noted digests.

    It sees what the recipe's digests, which are samples, do not.
    """
    digests = {role: blake3() for role in noted}
    for start in range(0, info.num_elements, _SLICE_ELEMENTS):
        stop = min(start + _SLICE_ELEMENTS, info.num_elements)
        read = {"base": virtual.base.read(info.name, start, stop)}
        if info.name in virtual.vector.names:
            read |= virtual.vector.slice(info.name, start, stop).read
        for role in digests.keys() & read.keys():
            digests[role].update(read[role].view(np.uint8).data)
    changed = [role for role, digest in digests.items() if digest.hexdigest() != noted[role]]
    return [f"{info.name}: the {role} model has changed since the result was made" for role in changed]


def _named(start: int, places: Array, found: Array, right: Array) -> str:
    """What the first of `places` (none: nothing) holds.

    `found` and `right` begin at the tensor's element `start`.
    """
    if not places.size:
        return ""
    place = slice(places[0], places[0] + 1)
    texts = [f"{_wide(values[place])[0]:.9g}" for values in (found, right)]
    if texts[0] == texts[1]:  # NaN of another kind, or an integer too long for this
        texts = [values[place].tobytes()[::-1].hex() for values in (found, right)]
    return f"element {start + places[0]} is {texts[0]} instead of {texts[1]}"


def _slices(
    name: str, stored: SliceReader, virtual: Virtual
) -> Iterator[tuple[int, Array, Array, Array, Array]]:
    """(start, stored values, right values, the base's as they would be stored, the change in float64)."""
    nearest, info = Arithmetic(Formula(0.0)), virtual.tensors[name]
    for start in range(0, info.num_elements, _SLICE_ELEMENTS):
        stop = min(start + _SLICE_ELEMENTS, info.num_elements)
        base = virtual.base.read(name, start, stop)
        kept, delta = np.empty(stop - start, array_dtype(info.dtype)), np.zeros(stop - start, np.float32)
        nearest.keep(name, start, base, kept)
        if name in virtual.vector.names:
            wide = widen(base, np.empty(stop - start, np.float32))
            change = virtual.vector.slice(name, start, stop)
            delta = change.compute(slice(0, stop - start), wide, delta)
        right = virtual.read(name, start, stop)
        yield start, stored.read(name, start, stop), right, kept, delta.astype(np.float64)


def _wide(values: Array) -> Array:
    """As float64."""
    is_narrow = values.dtype in NARROW
    return (widen(values, np.empty(values.size, np.float32)) if is_narrow else values).astype(np.float64)


def _bits(values: Array) -> Array:
    """By which -0 is not 0, and NaN is itself."""
    return values.view(f"u{values.itemsize}")
