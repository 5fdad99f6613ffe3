"""What a careful reviewer would flag in a run's results: one sentence each, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.artifact import Artifact
from pipeline.delta.survival import POOR_PROJECTION
from pipeline.report.compare import Scores
from pipeline.report.cost import step_label
from pipeline.report.terms import METRICS, SCORES, count, look, ordered_protocols, percent, short

Json = dict[str, Any]

FEW_RECORDS = 100
"""Below this, a score near 50% has a standard error above 5 points."""
LEAST_LOCALITY = 0.5
LEAST_KNOWN = 0.5
GOOD_PROJECTION = 0.9
LARGEST_NORM_RATIO = 2.0
LEAST_GENERALITY = 0.5
"""As a share of reliability."""
LARGEST_GAP = 0.2
"""Between token accuracy and free generation."""


def find(results: Json) -> list[str]:
    """All findings about `results` (its rows, known facts and survival)."""
    scores = Scores(results)
    methods = [entry["method"] for entry in results["methods"]]
    protocols = ordered_protocols(list(dict.fromkeys(row["protocol"] for row in results["rows"])))
    forgetting = [method for method in methods if scores.row(method, protocols[0], "forgotten")]
    found = [*_unknown(results["known"])]
    for method in forgetting:
        found += _not_forgotten(scores, method, protocols, results)
    found += _collapsed(scores, forgetting, protocols, "forgotten")
    found += _collapsed(scores, methods, protocols, "updated")
    for method, survival in results["survival"].items():
        found += _rounded_away(method, survival)
    for method in methods:
        found += _not_better(scores, method, protocols[0])
    found += _flattered(scores, methods)
    found += _recited(scores, methods, protocols[0])
    found += _few_records(results["rows"])
    found += _few_seeds(results["seeds"])
    return found


def from_stages(stages: list[Json], inputs: dict[str, Artifact]) -> list[str]:
    """The warnings that the steps (rows of `stages`) gave, each once, with the steps that gave it."""
    sources: dict[str, list[str]] = {}
    for row in stages:
        for text in inputs[row["id"]].result.get("warnings", []):
            sources.setdefault(text, []).append(step_label(row))
    return [f"{_named(labels)}: {text}" for text, labels in sources.items()]


def _named(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0].partition(':')[0]}, {len(labels)} steps"


def _unknown(known: Json) -> Iterator[str]:
    # Where it knew none at all, the evaluation itself says so.
    if 0 < known["num_known"] < LEAST_KNOWN * known["num_records"]:
        share = f"{count(known['num_known'])} of {count(known['num_records'])} old facts"
        yield (
            f"The original model knew only {share}: there was little to forget, so these results say little"
            " about forgetting."
        )


def _not_forgotten(scores: Scores, method: str, protocols: list[str], results: Json) -> Iterator[str]:
    failed = []
    for protocol in _graded(protocols):
        change = scores.by_forgetting(method, protocol)
        if change is not None and (change.is_noise or change.value > 0):
            before, after = (
                scores.get(method, protocol, state, "old_reliability") for state in ("original", "forgotten")
            )
            failed.append(f"{short(protocol)} {percent(before)}% before, {percent(after)}% after")
    if failed:
        scale = next(entry["scale"] for entry in results["methods"] if entry["method"] == method)
        yield (
            f"{look(method).label}: subtracting with lambda {scale:g} did not lower the old answers' score"
            f" beyond the noise ({'; '.join(failed)}). What follows cannot be credited to forgetting."
        )


def _graded(protocols: list[str]) -> list[str]:
    """All but `probability`: it ranks two answers, and the old one may stay ahead after losing most of its
    probability.
    """
    return [protocol for protocol in protocols if protocol != "probability"]


def _collapsed(scores: Scores, methods: list[str], protocols: list[str], state: str) -> Iterator[str]:
    when, advice = {
        "forgotten": ("After forgetting alone", "lambda is too large"),
        "updated": ("After the update", "the methods cost much that was not to change"),
    }[state]
    for protocol in _graded(protocols):
        localities = {method: scores.get(method, protocol, state, "locality") for method in methods}
        low = [
            f"{look(method).label} {percent(value)}%"
            for method, value in localities.items()
            if value is not None and value < LEAST_LOCALITY
        ]
        if low:
            told = f"{short(protocol)}, unchanged: {', '.join(low)}"
            yield f"{when}, most unrelated answers have changed ({told}): {advice}."


def _rounded_away(method: str, survival: Json) -> Iterator[str]:
    # Where nearly nothing is left, the forget stage itself says so.
    projection, norm_ratio = survival["projection"], survival["norm_ratio"]
    if projection is not None and POOR_PROJECTION <= projection < GOOD_PROJECTION:
        yield (
            f"{look(method).label}: rounding to the stored type kept only {projection:.0%} of the intended"
            " change along its own direction; set forget.dtype to float32, or forget.rounding to stochastic."
        )
    if norm_ratio is not None and norm_ratio > LARGEST_NORM_RATIO:
        yield (
            f"{look(method).label}: the stored change is {norm_ratio:.1f} times as large as the intended one,"
            " the rest being rounding noise; set forget.dtype to float32."
        )


def _not_better(scores: Scores, method: str, protocol: str) -> Iterator[str]:
    baseline = look(method).baseline
    if baseline is None:
        return
    verdicts: dict[str, list[str]] = {}
    for metric in ("reliability", "generality"):
        change = scores.to_baseline(method, protocol, metric)
        if change is None or (change.value > 0 and not change.is_noise):
            continue
        ours, theirs = (scores.get(m, protocol, "updated", metric) for m in (method, baseline))
        verdict = "not measurably better than" if change.is_noise else "worse than"
        difference = f"{change.points} points, noise {change.noise_points}"
        text = f"{METRICS[metric].label.lower()} {percent(ours)}% against {percent(theirs)}% ({difference})"
        verdicts.setdefault(verdict, []).append(text)
    for verdict, texts in verdicts.items():
        compared = f"{look(method).label} is {verdict} {look(baseline).label} in {short(protocol)}"
        yield f"{compared}: {'; '.join(texts)}."


def _flattered(scores: Scores, methods: list[str]) -> Iterator[str]:
    gaps = []
    for method in methods:
        token, generation = (
            scores.get(method, protocol, "updated", "reliability") for protocol in ("token", "generation")
        )
        if token is not None and generation is not None and token - generation > LARGEST_GAP:
            gaps.append(f"{look(method).label} {percent(token)}% against {percent(generation)}%")
    if gaps:
        yield f"Token accuracy flatters: far fewer of the free answers are the new one ({', '.join(gaps)})."


def _recited(scores: Scores, methods: list[str], protocol: str) -> Iterator[str]:
    found = []
    for method in methods:
        reliability, generality = (
            scores.get(method, protocol, "updated", metric) for metric in ("reliability", "generality")
        )
        if reliability and generality is not None and generality < LEAST_GENERALITY * reliability:
            found.append(f"{look(method).label} {percent(generality)}% against {percent(reliability)}%")
    if found:
        yield (
            "The new answers are recited rather than known: rephrased, the questions rarely get them"
            f" ({short(protocol)}, generality against reliability: {', '.join(found)})."
        )


def _few_records(rows: list[Json]) -> Iterator[str]:
    least: dict[str, int] = {}
    for row in rows:
        for metric in SCORES:
            count = row["counts"].get(metric)
            if count and row[metric] is not None:
                least[metric] = min(count, least.get(metric, count))
    few = {metric: least[metric] for metric in SCORES if least.get(metric, FEW_RECORDS) < FEW_RECORDS}
    if few:
        named = ", ".join(f"{METRICS[metric].label.lower()} {count}" for metric, count in few.items())
        error = 50 / min(few.values()) ** 0.5
        yield (
            f"Few records ({named}): a standard error may reach {error:.0f} points, so small differences mean"
            " nothing."
        )


def _few_seeds(seeds: list[int]) -> Iterator[str]:
    if len(seeds) == 2:
        yield (
            "Two seeds tell little of how far seeds lie apart: hardly any difference can stand out from the"
            " noise; give three or more."
        )
