"""The `generation` protocol: what the model says by itself, decoded greedily from the question alone.

Reliability is exact match after SQuAD's normalisation. `*_contains` asks only that the answer stands in what
was said.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.evaluate.outputs import Outputs
from pipeline.evaluate.scores import mean
from pipeline.facts.fact import Fact

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def questions(fact: Fact) -> Iterator[str]:
    """The questions that `score` looks at."""
    yield fact.prompt
    yield from fact.rephrasings
    for probe in [*fact.locality, *fact.portability]:
        yield probe.prompt


def score(fact: Fact, outputs: Outputs, reference: dict[str, Any] | None) -> dict[str, Any]:
    """The record's scores, and the raw generations that they come from.

    `reference` is what this function returned for the original model; without it there is no locality.
    """
    generated = outputs.generated
    said = generated[fact.prompt]
    rephrasings = [generated[rephrasing] for rephrasing in fact.rephrasings]
    locality = [generated[probe.prompt] for probe in fact.locality]
    portability = [generated[probe.prompt] for probe in fact.portability]
    followed = [(generated[probe.prompt], probe.answers) for probe in fact.portability if probe.answers]
    old, new = fact.old_answers, [fact.new_answer]
    scores: dict[str, float | None] = {
        "reliability": float(is_match(said, new)),
        "reliability_contains": float(contains(said, new)),
        "generality": mean([float(is_match(text, new)) for text in rephrasings]),
        "generality_contains": mean([float(contains(text, new)) for text in rephrasings]),
        "locality": None if reference is None else _share_unchanged(locality, reference["locality"]),
        "portability": mean([float(is_match(text, answers)) for text, answers in followed]),
        "portability_contains": mean([float(contains(text, answers)) for text, answers in followed]),
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
    """Whether `said` gives an old answer of `fact` and not the new one."""
    old_answers = [answer for answer in fact.old_answers if not is_match(answer, [fact.new_answer])]
    if not contains(said, old_answers):
        return False
    text = f" {normalise(said)} "
    # Where the new answer is a part of the old one (Charles, Prince Charles), it counts only outside of it.
    for answer in old_answers:
        if contains(answer, [fact.new_answer]):
            text = text.replace(f" {normalise(answer)} ", " | ")
    return f" {normalise(fact.new_answer)} " not in text


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and extra blanks (as SQuAD 1.1 evaluates).

    A text that consists of nothing else (`The The`, `A`, `!!!`) stays as it is, in lower case.
    """
    lower = " ".join(text.lower().split())
    # Empty, all such answers would be the same one.
    return " ".join(_ARTICLES.sub(" ", lower.translate(_PUNCTUATION)).split()) or lower


def is_match(text: str, answers: Iterable[str]) -> bool:
    """Whether `text` is one of `answers`, normalised."""
    return normalise(text) in {normalise(answer) for answer in answers}


def contains(text: str, answers: Iterable[str]) -> bool:
    """Whether one of `answers` stands in `text` as whole words, both normalised."""
    padded = f" {normalise(text)} "  # blanks on both sides: Rome is not in Romeo
    return any(f" {normalise(answer)} " in padded for answer in answers)


def _share_unchanged(after: list[str], before: list[str]) -> float | None:
    pairs = zip(after, before, strict=True)
    return mean([float(normalise(left) == normalise(right)) for left, right in pairs])
