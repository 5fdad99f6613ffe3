"""The run in plain words: a headline and a few sentences, computed from the numbers and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.report.compare import Scores
from pipeline.report.cost import update_seconds
from pipeline.report.terms import look, ordered_protocols, percent, short

Json = dict[str, Any]


class Summary(NamedTuple):
    """`headline` stands large on the page; `points` are whole sentences below it."""

    headline: str
    points: list[str]


def summarise(results: Json) -> Summary:
    """What a reader in a hurry should take away; under the most telling protocol that was measured."""
    protocol = ordered_protocols([row["protocol"] for row in results["rows"]])[0]
    scores = Scores(results)
    methods = [entry["method"] for entry in results["methods"]]
    best = _best(scores, methods, protocol)
    points = [
        _original(scores, methods[0], protocol),
        *(_method(scores, method, protocol, results) for method in methods),
    ]
    num_seeds = len(results["seeds"])
    if num_seeds > 1:
        points.insert(0, f"All scores are means over {num_seeds} seeds; ± is their standard deviation.")
    return Summary(_headline(scores, best, protocol), [point for point in points if point])


def _best(scores: Scores, methods: list[str], protocol: str) -> str:
    """The method to talk about: of those that forget, if there are any, the one with the highest
    reliability.
    """
    candidates = [method for method in methods if look(method).subtract] or methods
    return max(
        candidates,
        key=lambda method: (scores.row(method, protocol, "updated") or {}).get("reliability") or 0.0,
    )


def _headline(scores: Scores, method: str, protocol: str) -> str:
    new, left = (scores.get(method, protocol, "updated", metric) for metric in ("reliability", "leakage"))
    before = scores.get(method, protocol, "original", "leakage")
    text = f"{look(method).label} learned {percent(new)}% of the new answers"
    if left is not None and before is not None:
        text += f" and still gives {percent(left)}% of the old ones (originally {percent(before)}%)"
    return text + "."


def _original(scores: Scores, method: str, protocol: str) -> str | None:
    new, old = (scores.get(method, protocol, "original", metric) for metric in ("reliability", "leakage"))
    if new is None or old is None:
        return None
    told = f"{percent(old)}% of the questions get the old answer and {percent(new)}% the new one"
    return f"Before any update, {told} ({short(protocol)})."


def _method(scores: Scores, method: str, protocol: str, results: Json) -> str | None:
    baseline = look(method).baseline
    if baseline is None:
        return None
    parts = [
        _forgetting(scores, method, protocol),
        _gain(scores, method, baseline, protocol),
        _cost(results, method, baseline),
    ]
    scale = next(entry["scale"] for entry in results["methods"] if entry["method"] == method)
    name = look(method).label + ("" if scale is None else f" (λ = {scale:g})")
    told = [part for part in parts if part]
    return f"{name}: {'; '.join(told)}." if told else None


def _forgetting(scores: Scores, method: str, protocol: str) -> str | None:
    before, after = (
        scores.get(method, protocol, state, "old_reliability") for state in ("original", "forgotten")
    )
    if before is None or after is None:
        return None
    return f"subtracting alone took the old answers from {percent(before)}% to {percent(after)}%"


def _gain(scores: Scores, method: str, baseline: str, protocol: str) -> str | None:
    change = scores.to_baseline(method, protocol, "reliability")
    if change is None:
        return None
    if change.value == 0:
        return f"in the end it gives as many new answers as {look(baseline).label}"
    amount = f"{100 * abs(change.value):.1f} points {'fewer' if change.value < 0 else 'more'}"
    judgement = ", which is within the noise" if change.is_noise else ""
    against = f"{look(baseline).label} (noise: {change.noise_points})"
    return f"in the end it gives {amount} new answers than {against}{judgement}"


def _cost(results: Json, method: str, baseline: str) -> str | None:
    seconds, reference = (sum(update_seconds(results, m).values()) for m in (method, baseline))
    return f"training took {seconds / reference:.2f} times as long" if seconds and reference else None
