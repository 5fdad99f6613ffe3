"""Scores and differences of a results object, and which differences are larger than the noise.

Several seeds are shown as their mean and standard deviation. Their records are never pooled: the questions
are the same, and would count as more evidence than there is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.report.seeds import average, margin, over_seeds
from pipeline.report.terms import ROW_METRICS

Json = dict[str, Any]


class Difference(NamedTuple):
    """One score minus another over the same records, as a fraction of 1, and how much of it may be chance."""

    value: float
    noise: float

    @property
    def is_noise(self) -> bool:
        return abs(self.value) <= self.noise

    @property
    def points(self) -> str:
        return f"{100 * self.value:+.1f}".replace("-", "−")

    @property
    def noise_points(self) -> str:
        return f"±{100 * self.noise:.1f}"


class Scores:
    """A results object's scores by method, protocol and state, and its comparisons."""

    def __init__(self, results: Json) -> None:
        rows = over_seeds(results["rows"], ("method", "protocol", "state"), ROW_METRICS)
        for row in rows:
            row["spread"] = row["deviation"] if row["num_seeds"] > 1 else row["stderr"]
        self._rows = {(row["method"], row["protocol"], row["state"]): row for row in rows}
        self._comparisons: dict[tuple[str, ...], list[Json]] = {}
        for row in results["comparisons"]:
            key = row["method"], row["state"], row["protocol"], row["metric"]
            self._comparisons.setdefault(key, []).append(row)

    def row(self, method: str, protocol: str, state: str) -> Json | None:
        """The scores of one model; over several seeds their means.

        `spread`, by metric, is what stands behind ±: the standard error over records with one seed, the
        standard deviation over seeds with several.
        """
        return self._rows.get((method, protocol, state))

    def get(self, method: str, protocol: str, state: str, metric: str) -> float | None:
        """A score as a fraction of 1; None where it was not measured."""
        row = self.row(method, protocol, state)
        value: float | None = row[metric] if row else None
        return value

    def to_baseline(self, method: str, protocol: str, metric: str) -> Difference | None:
        """The updated model minus that of the method's baseline."""
        return self._difference(method, "updated", protocol, metric)

    def by_forgetting(self, method: str, protocol: str) -> Difference | None:
        """How forgetting alone changed the old answers' score: below 0 if it worked."""
        return self._difference(method, "forgotten", protocol, "old_reliability")

    def _difference(self, method: str, state: str, protocol: str, metric: str) -> Difference | None:
        """With one seed: over its records, two standard errors are noise. With several: over the seeds'
        differences, each paired within its seed, and the noise is the mean's 95% interval.
        """
        pairs = self._comparisons.get((method, state, protocol, metric), [])
        differences = [row["difference"] for row in pairs]
        if not pairs or None in differences:
            return None
        noise = margin(differences) if len(pairs) > 1 else 2 * (pairs[0]["stderr"] or 0.0)
        # Never less than one record's worth: 64 right of 64 is no proof that every record would be right.
        return Difference(average(differences), max(noise, 2 / pairs[0]["num_records"]))
