"""From records to scores: means with counts and standard errors, over all facts and over the known ones."""

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
"""Each protocol's scores of one record. Protocols mean different things by the same name."""

Row = dict[str, Any]
"""One fact's record: `id`, `knows_old`, and for each protocol its `scores` and raw outputs.

A score is null where it does not exist.
"""


def mean(values: Sequence[float]) -> float | None:
    """Their mean; None if there are none."""
    # fsum is exact, so a score does not depend on the order of its records.
    return math.fsum(values) / len(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of their mean, from the sample's standard deviation; None for fewer than two."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """0 if one of them is 0; None if one of them is missing, or there are none."""
    present = [value for value in values if value is not None]
    # Without the missing ones the mean would look better than it is.
    if not present or len(present) < len(values):
        return None
    return 0.0 if 0 in present else len(present) / math.fsum(1 / value for value in present)


def aggregate(rows: Sequence[Row], protocols: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each of `protocols` its metrics' means over `rows`.

    Beside them stand `counts` (records that have the score) and `stderr`. `probability` also gets ROME's `S`,
    the harmonic mean of its three scores.
    """
    summary = {name: _summarise([row[name]["scores"] for row in rows], METRICS[name]) for name in protocols}
    if "probability" in summary:
        scores = summary["probability"]
        scores["S"] = harmonic_mean([scores[metric] for metric in ("reliability", "generality", "locality")])
    return summary


def split_by_known(rows: Sequence[Row], original: Sequence[Row], protocols: Sequence[str]) -> dict[str, Any]:
    """Scores of `rows` over the facts that the original model knew, and over those that it did not know.

    Forgetting only makes sense where it knew the old fact. `original` are that model's own rows. Facts
    without an old answer count in neither group.
    """
    verdicts = {row["id"]: row["knows_old"] for row in original}
    known = [row for row in rows if verdicts[row["id"]] is True]
    unknown = [row for row in rows if verdicts[row["id"]] is False]
    return {
        "known": {
            "num_known": len(known),
            "num_records": len(known) + len(unknown),
            "protocols": aggregate(known, protocols),
        },
        "unknown": {"num_records": len(unknown), "protocols": aggregate(unknown, protocols)},
    }


def _summarise(scores: list[dict[str, float | None]], metrics: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    for metric in metrics:
        found = (one[metric] for one in scores)
        values[metric] = [value for value in found if value is not None]
    return {
        **{metric: mean(found) for metric, found in values.items()},
        "counts": {metric: len(found) for metric, found in values.items()},
        "stderr": {metric: standard_error(found) for metric, found in values.items()},
    }
