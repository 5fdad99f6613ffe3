"""What a stored tensor holds instead of what it should: the base's values, another scale's result, or a few wrong elements."""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose, sqrt

import torch

from pipeline.delta.arithmetic import Arithmetic, Formula
from pipeline.delta.plan import Item
from pipeline.weights.adapter import AdapterSource
from pipeline.weights.source import TensorSource

_SLICE_ELEMENTS = 1 << 20
_SAME_DIRECTION = 0.99
"""Cosine from which a stored change counts as another scale of the same delta."""


def explain(item: Item, stored: TensorSource, base: TensorSource, tuned: TensorSource, formula: Formula) -> str:
    """In what way the tensor `item` of `stored` differs from base - scale * (tuned - base)."""
    num_wrong, first, equals_base = 0, "", True
    delta_square = change_square = product = 0.0
    for start, found, right, kept, delta in _slices(item, stored, base, tuned, formula):
        wrong = (found != right).nonzero().flatten()
        if len(wrong) and not num_wrong:
            place = int(wrong[0])
            first = f"element {start + place} is {found[place].item():.9g} instead of {right[place].item():.9g}"
        num_wrong += len(wrong)
        equals_base = equals_base and torch.equal(found, kept)
        change = found.double() - kept.double()
        delta_square += float(delta.dot(delta))
        change_square += float(change.dot(change))
        product += float(delta.dot(change))
    if num_wrong == 0:
        return "holds the right values; its digest in the manifest is wrong"
    if equals_base:
        return "holds the base's values: nothing was subtracted"
    is_along = delta_square > 0 and abs(product) >= _SAME_DIRECTION * sqrt(delta_square * change_square)
    if is_along and not isclose(-product / delta_square, formula.scale, rel_tol=1e-3):
        return f"was made with scale {-product / delta_square:.4g} instead of {formula.scale:.4g}"
    return f"{num_wrong} of {item.info.num_elements} elements differ; {first}"


def _slices(
    item: Item, stored: TensorSource, base: TensorSource, tuned: TensorSource, formula: Formula
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(start, stored values, right values, the base's values as they would be stored, delta in float64), slice by slice."""
    arithmetic = Arithmetic(formula)
    dtype = getattr(torch, item.info.dtype)
    for start in range(0, item.info.num_elements, _SLICE_ELEMENTS):
        stop = min(start + _SLICE_ELEMENTS, item.info.num_elements)
        values = base.read(item.base.name, start, stop)
        right = torch.empty(stop - start, dtype=dtype)
        if item.other is None:
            arithmetic.keep(item.info.name, start, values, right)
            delta = torch.zeros(stop - start, dtype=torch.float64)
        elif isinstance(tuned, AdapterSource):
            change = tuned.delta(item.other, start, stop)
            arithmetic.subtract(item.info.name, start, values, change, right, True)
            delta = change.double()
        else:
            other = tuned.read(item.other, start, stop)
            arithmetic.subtract(item.info.name, start, values, other, right, False)
            delta = other.double() - values.double()
        yield start, stored.read(item.info.name, start, stop), right, values.to(dtype), delta
