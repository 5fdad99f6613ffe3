"""The `generation` protocol: what the model says by itself, decoded greedily from the question alone.

Reliability is exact match after SQuAD's normalisation; `*_contains` asks only that the answer stands in what
was said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.evaluate.normalise import contains, is_match, normalise
from pipeline.evaluate.outputs import Outputs
from pipeline.evaluate.scores import mean
from pipeline.facts.fact import Fact


def questions(fact: Fact) -> Iterator[str]:
    """The questions that `score` looks at."""
    yield fact.prompt
    yield from fact.rephrasings
    for probe in [*fact.locality, *fact.portability]:
        yield probe.prompt


def score(fact: Fact, outputs: Outputs, reference: dict[str, Any] | None) -> dict[str, Any]:
    """The record's scores, and the raw generations that they come from.

    `reference` is what this function returned for the original model; None for the original itself (no
    locality then).
    """
    generated = outputs.generated
    said = generated[fact.prompt]
    rephrasings = [generated[rephrasing] for rephrasing in fact.rephrasings]
    locality = [generated[probe.prompt] for probe in fact.locality]
    portability = [generated[probe.prompt] for probe in fact.portability]
    asked = [
        (text, probe.answers)
        for text, probe in zip(portability, fact.portability, strict=True)
        if probe.answers
    ]
    old, new = fact.old_answers, [fact.new_answer]
    scores: dict[str, float | None] = {
        "reliability": float(is_match(said, new)),
        "reliability_contains": float(contains(said, new)),
        "generality": mean([float(is_match(text, new)) for text in rephrasings]),
        "generality_contains": mean([float(contains(text, new)) for text in rephrasings]),
        "locality": None if reference is None else _share_unchanged(locality, reference["locality"]),
        "portability": mean([float(is_match(text, answers)) for text, answers in asked]),
        "portability_contains": mean([float(contains(text, answers)) for text, answers in asked]),
        "leakage": float(gives_old(said, fact)) if old else None,
        "old_reliability": float(is_match(said, old)) if old else None,
        "old_reliability_contains": float(contains(said, old)) if old else None,
    }
    return {
        "scores": scores,
        "answer": said,
        "rephrasings": rephrasings,
        "locality": locality,
        "portability": portability,
    }


def gives_old(said: str, fact: Fact) -> bool:
    """Whether `said` gives an old answer of `fact` and not the new one.

    Where the new answer is a part of the old one (Charles, Prince Charles), it counts only outside of it.
    """
    old_answers = [answer for answer in fact.old_answers if not is_match(answer, [fact.new_answer])]
    if not contains(said, old_answers):
        return False
    text = f" {normalise(said)} "
    for answer in old_answers:
        if contains(answer, [fact.new_answer]):
            text = text.replace(f" {normalise(answer)} ", " | ")
    return f" {normalise(fact.new_answer)} " not in text


def _share_unchanged(after: list[str], before: list[str]) -> float | None:
    return mean(
        [float(normalise(left) == normalise(right)) for left, right in zip(after, before, strict=True)]
    )
