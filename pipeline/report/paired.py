"""Whether one model is better than another on the same records: mean differences, record by record, with
their errors.

The two models answered the same questions, so the error of the difference is that of the differences: hard
questions, which both get wrong, do not blur it.
"""

from __future__ import annotations

from typing import Any

from pipeline.evaluate.scores import mean, standard_error
from pipeline.report.names import SCORES, look
from pipeline.report.records import Records

Json = dict[str, Any]


def compare(methods: list[Json], records: dict[str, Records]) -> list[Json]:
    """Every F-Learning method's updated model against its baseline's, and its forgotten model against the
    original.
    """
    evaluations = {m["method"]: m["evaluations"] for m in methods}
    rows: list[Json] = []
    for method, states in evaluations.items():
        baseline = look(method).baseline
        if baseline in evaluations:
            pair = records[states["updated"]], records[evaluations[baseline]["updated"]]
            rows += _rows({"method": method, "state": "updated", "against": baseline}, *pair, SCORES)
        if "forgotten" in states:
            pair = records[states["forgotten"]], records[states["original"]]
            rows += _rows(
                {"method": method, "state": "forgotten", "against": "original"}, *pair, ("old_reliability",)
            )
    return rows


def _rows(labels: Json, ours: Records, theirs: Records, metrics: tuple[str, ...]) -> list[Json]:
    found = []
    for (protocol, metric), scores in ours.scores.items():
        if metric in metrics:
            pairs = zip(scores, theirs.scores[protocol, metric], strict=True)
            differences = [a - b for a, b in pairs if a is not None and b is not None]
            found.append(labels | {"protocol": protocol, "metric": metric} | _difference(differences))
    return found


def _difference(differences: list[float]) -> Json:
    return {
        "difference": mean(differences),
        "stderr": standard_error(differences),
        "num_records": len(differences),
    }
