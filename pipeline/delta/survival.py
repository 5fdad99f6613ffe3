"""Survival: how much of the intended change is left in the weights as they are stored.

16-bit weights swallow small changes: rounding to nearest turns most of them into no change at all, stochastic
rounding keeps their mean at the price of noise. The stored change of a weight is its stored value minus the
base's value rounded to the same dtype. Sums are good to about 6 digits; which digits follow depends on the
processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

POOR_PROJECTION = 0.5
"""Below this share of the intended change (projected on its own direction) a result earns a warning."""


@dataclass
class Survival:
    """Sums over the weights of a tensor, a layer or a model.

    Delta is tuned - base, change is what was stored.
    """

    num_elements: int = 0
    num_changed: int = 0
    base_square: float = 0.0
    delta_square: float = 0.0
    change_square: float = 0.0
    delta_change: float = 0.0
    """Inner product of delta and the stored change."""

    def add(self, other: Survival) -> None:
        """Include `other`'s weights."""
        self.num_elements += other.num_elements
        self.num_changed += other.num_changed
        self.base_square += other.base_square
        self.delta_square += other.delta_square
        self.change_square += other.change_square
        self.delta_change += other.delta_change

    @property
    def is_finite(self) -> bool:
        """False if any weight, read or written, is NaN or infinite.

        Squares of finite float32 numbers cannot overflow float64.
        """
        return isfinite(self.base_square) and isfinite(self.delta_square) and isfinite(self.change_square)

    def figures(self, scale: float) -> dict[str, Any]:
        """The figures to show; None where no change was intended, or none was stored."""
        # The intended change is -scale * delta: sums over delta alone do for every scale.
        intended_square = scale * scale * self.delta_square
        along = -scale * self.delta_change
        both = sqrt(intended_square * self.change_square)
        return {
            "num_elements": self.num_elements,
            "share_changed": _ratio(self.num_changed, self.num_elements),
            "projection": _ratio(along, intended_square),
            "cosine": _ratio(along, both),
            "norm_ratio": _ratio(sqrt(self.change_square), sqrt(intended_square)),
            "delta_norm": _rounded(sqrt(self.delta_square)),
            "base_norm": _rounded(sqrt(self.base_square)),
            "relative_norm": _ratio(sqrt(self.delta_square), sqrt(self.base_square)),
            "change_norm": _rounded(sqrt(self.change_square)),
        }


def _ratio(value: float, whole: float) -> float | None:
    return _rounded(value / whole) if whole else None


def _rounded(value: float) -> float:
    """5 digits. Sums in another order (another processor or shard size) hardly ever differ in them."""
    return float(f"{value:.5g}")
