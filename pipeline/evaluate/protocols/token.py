"""The `token` protocol (EasyEdit): teacher-forced argmax, token by token.

It flatters: the answer's earlier tokens are given, so a model that would never say it still gets points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.evaluate.outputs import Outputs, Pair, agreement
from pipeline.evaluate.scores import mean
from pipeline.facts.fact import Fact, Probe


def pairs(fact: Fact) -> Iterator[Pair]:
    """The (question, answer) pairs that `score` looks at."""
    yield fact.prompt, fact.new_answer
    if fact.old_answer is not None:
        yield fact.prompt, fact.old_answer
    for rephrasing in fact.rephrasings:
        yield rephrasing, fact.new_answer
    for probe in _answered(fact.locality) + _answered(fact.portability):
        yield probe.prompt, probe.answers[0]


def score(fact: Fact, outputs: Outputs, reference: dict[str, Any] | None) -> dict[str, Any]:
    """The record's scores, and the likeliest tokens at its locality answers, for later models' locality.

    `reference` is what this function returned for the original model; without it there is no locality.
    """
    forced = outputs.forced
    rephrasings = [forced[rephrasing, fact.new_answer] for rephrasing in fact.rephrasings]
    portability = [forced[probe.prompt, probe.answers[0]] for probe in _answered(fact.portability)]
    old = forced[fact.prompt, fact.old_answer] if fact.old_answer is not None else None
    locality = [forced[probe.prompt, probe.answers[0]].argmax for probe in _answered(fact.locality)]
    scores = {
        "reliability": forced[fact.prompt, fact.new_answer].accuracy,
        "generality": mean([one.accuracy for one in rephrasings]),
        "locality": None if reference is None else _agreements(locality, reference["locality_argmax"]),
        "portability": mean([one.accuracy for one in portability]),
        "leakage": None if old is None else float(old.accuracy == 1),
        "old_reliability": None if old is None else old.accuracy,
    }
    return {"scores": scores, "locality_argmax": locality}


def _answered(probes: list[Probe]) -> list[Probe]:
    # A locality question's answer is not judged: it only says at how many tokens to look.
    return [probe for probe in probes if probe.answers]


def _agreements(after: list[list[int]], before: list[list[int]]) -> float | None:
    return mean([agreement(left, right) for left, right in zip(after, before, strict=True)])
