"""Whether one model is better than another of the same seed: mean differences, record by record.

The two answered the same questions, so the error of the difference is that of the differences: hard
questions, which both get wrong, do not blur it.
"""

from __future__ import annotations

from typing import Any

from pipeline.evaluate.scores import mean, standard_error
from pipeline.report.columns import Records
from pipeline.report.terms import SCORES, look

Json = dict[str, Any]


def compare(updates: list[Json], records: dict[str, Records]) -> list[Json]:
    """Every updated model against its baseline's, and every forgotten one against the original."""
    evaluations = {(update["method"], update["seed"]): update["evaluations"] for update in updates}
    rows: list[Json] = []
    for (method, seed), states in evaluations.items():
        baseline = evaluations.get((look(method).baseline or "", seed))
        labels = {"method": method, "seed": seed}
        if baseline is not None:
            pair = records[states["updated"]], records[baseline["updated"]]
            labels |= {"state": "updated", "against": look(method).baseline}
            rows += _rows(labels, *pair, SCORES)
        if "forgotten" in states:
            pair = records[states["forgotten"]], records[states["original"]]
            rows += _rows(labels | {"state": "forgotten", "against": "original"}, *pair, ("old_reliability",))
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
