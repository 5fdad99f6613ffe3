"""Looks up scores and differences in a results object, and says which differences are larger than the
noise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Json = dict[str, Any]


class Difference(NamedTuple):
    """One score minus another over the same records, as a fraction of 1, and its standard error."""

    value: float
    stderr: float

    @property
    def is_noise(self) -> bool:
        """Whether two standard errors cover it."""
        return abs(self.value) <= 2 * self.stderr

    @property
    def points(self) -> str:
        return f"{100 * self.value:+.1f}".replace("-", "−")

    @property
    def noise_points(self) -> str:
        return f"±{200 * self.stderr:.1f}"


class Scores:
    """A results object's rows by method, protocol and state, and its comparisons."""

    def __init__(self, results: Json) -> None:
        self._rows = {(row["method"], row["protocol"], row["state"]): row for row in results["rows"]}
        self._comparisons = {
            (row["method"], row["state"], row["protocol"], row["metric"]): row
            for row in results["comparisons"]
        }

    def row(self, method: str, protocol: str, state: str) -> Json | None:
        return self._rows.get((method, protocol, state))

    def get(self, method: str, protocol: str, state: str, metric: str) -> float | None:
        """A score as a fraction of 1; None where it was not measured."""
        row = self.row(method, protocol, state)
        value: float | None = row[metric] if row else None
        return value

    def to_baseline(self, method: str, protocol: str, metric: str) -> Difference | None:
        """The updated model minus that of the same training without forgetting."""
        return self._difference(method, "updated", protocol, metric)

    def by_forgetting(self, method: str, protocol: str) -> Difference | None:
        """How forgetting alone changed the old answers' score: below 0 if it worked."""
        return self._difference(method, "forgotten", protocol, "old_reliability")

    def _difference(self, method: str, state: str, protocol: str, metric: str) -> Difference | None:
        row = self._comparisons.get((method, state, protocol, metric))
        if row is None or row["difference"] is None:
            return None
        # Never less than one record's worth: 64 right of 64 is no proof that every record would be right.
        return Difference(row["difference"], max(row["stderr"] or 0.0, 1 / row["num_records"]))
