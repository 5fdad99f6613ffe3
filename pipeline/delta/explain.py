"""What a stored tensor holds instead of what it should: the base's values, another scale's result, or a few
wrong elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isclose, sqrt

import numpy as np

from pipeline.delta.arithmetic import Arithmetic, Formula
from pipeline.delta.floats import NARROW, Array, array_dtype, of_tensor, widen
from pipeline.delta.plan import Item
from pipeline.weights.adapter import AdapterSource
from pipeline.weights.source import TensorSource

_SLICE_ELEMENTS = 1 << 20
_SAME_DIRECTION = 0.99
"""Cosine from which a stored change counts as another scale of the same delta."""


@np.errstate(all="ignore")
def explain(
    item: Item, stored: TensorSource, base: TensorSource, tuned: TensorSource, formula: Formula
) -> str:
    """In what way the tensor `item` of `stored` differs from base - scale * (tuned - base)."""
    num_wrong, first, not_finite = 0, "", ""
    equals_base, only_signs = True, True
    delta_square = change_square = product = 0.0
    for start, found, right, kept, delta in _slices(item, stored, base, tuned, formula):
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
    if num_wrong == 0:
        return "holds the right values; its digest in the manifest is wrong"
    if only_signs:
        return f"{num_wrong} of {item.info.num_elements} elements differ, in the sign of zero alone; {first}"
    if equals_base:
        return "holds the base's values: nothing was subtracted"
    is_along = delta_square > 0 and _SAME_DIRECTION * sqrt(delta_square * change_square) <= abs(product) < inf
    if is_along and not isclose(-product / delta_square, formula.scale, rel_tol=1e-3):
        return f"was made with scale {-product / delta_square:.4g} instead of {formula.scale:.4g}"
    return f"{num_wrong} of {item.info.num_elements} elements differ; {not_finite or first}"


def _named(start: int, places: Array, found: Array, right: Array) -> str:
    """What the first of `places` (none: nothing) holds; `found` and `right` begin at the tensor's element
    `start`.
    """
    if not places.size:
        return ""
    place = slice(places[0], places[0] + 1)
    texts = [f"{_wide(values[place])[0]:.9g}" for values in (found, right)]
    if texts[0] == texts[1]:  # NaN of another kind, or an integer too long for this
        texts = [values[place].tobytes()[::-1].hex() for values in (found, right)]
    return f"element {start + places[0]} is {texts[0]} instead of {texts[1]}"


def _slices(
    item: Item, stored: TensorSource, base: TensorSource, tuned: TensorSource, formula: Formula
) -> Iterator[tuple[int, Array, Array, Array, Array]]:
    """(start, stored values, right values, the base's values as they would be stored, delta in float64),
    slice by slice.
    """
    arithmetic, nearest = Arithmetic(formula), Arithmetic(Formula(0.0))
    for start in range(0, item.info.num_elements, _SLICE_ELEMENTS):
        stop = min(start + _SLICE_ELEMENTS, item.info.num_elements)
        values = of_tensor(base.read(item.base.name, start, stop))
        right, kept = np.empty((2, stop - start), array_dtype(item.info.dtype))
        nearest.keep(item.info.name, start, values, kept)
        if item.other is None:
            arithmetic.keep(item.info.name, start, values, right)
            delta = np.zeros(stop - start)
        elif isinstance(tuned, AdapterSource):
            change = of_tensor(tuned.delta(item.other, start, stop))
            arithmetic.subtract(item.info.name, start, values, change, right, True)
            delta = _wide(change)
        else:
            other = of_tensor(tuned.read(item.other, start, stop))
            arithmetic.subtract(item.info.name, start, values, other, right, False)
            delta = _wide(other) - _wide(values)
        yield start, of_tensor(stored.read(item.info.name, start, stop)), right, kept, delta


def _wide(values: Array) -> Array:
    """As float64."""
    return (widen(values, np.empty(values.size, np.float32)) if values.dtype in NARROW else values).astype(
        np.float64
    )


def _bits(values: Array) -> Array:
    """By which -0 is not 0, and NaN is itself."""
    return values.view(f"u{values.itemsize}")
