"""From records to scores: means over records, with their counts and standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_COMMON = ("reliability", "generality", "locality", "portability", "leakage", "old_reliability")

METRICS: dict[str, tuple[str, ...]] = {
    "token": _COMMON,
    "probability": _COMMON,
    "generation": (
        *_COMMON,
        "reliability_contains",
        "generality_contains",
        "portability_contains",
        "old_reliability_contains",
    ),
}
"""Every protocol's scores of one record; each protocol means its own thing by them."""

Row = dict[str, Any]
"""One fact's record: `id`, `knows_old`, and for each protocol its `scores` (null where a score does not
exist) and raw outputs.
"""


def mean(values: Sequence[float]) -> float | None:
    """Their mean; None if there are none."""
    return math.fsum(values) / len(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of their mean, from the sample's standard deviation; None for fewer than two."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def aggregate(rows: Sequence[Row], protocols: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each of `protocols` its metrics' means over `rows`, with `counts` (records that have the score) and
    `stderr`.

    `probability` also gets ROME's `S`, the harmonic mean of its three scores.
    """
    summary = {name: _summarise([row[name]["scores"] for row in rows], METRICS[name]) for name in protocols}
    if "probability" in summary:
        scores = summary["probability"]
        scores["S"] = harmonic_mean([scores[metric] for metric in ("reliability", "generality", "locality")])
    return summary


def _summarise(scores: list[dict[str, float | None]], metrics: tuple[str, ...]) -> dict[str, Any]:
    values = {metric: [value for one in scores if (value := one[metric]) is not None] for metric in metrics}
    return {
        **{metric: mean(found) for metric, found in values.items()},
        "counts": {metric: len(found) for metric, found in values.items()},
        "stderr": {metric: standard_error(found) for metric, found in values.items()},
    }


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """0 if one of them is 0; None if one of them is missing."""
    present = [value for value in values if value is not None]
    if not present or len(present) < len(values):
        return None
    return 0.0 if 0 in present else len(present) / math.fsum(1 / value for value in present)
