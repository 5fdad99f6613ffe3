"""The `probability` protocol (ROME): which answer the model holds more likely, the new or the old one.

Reliability is ROME's efficacy score (ES), generality its paraphrase score (PS), locality its neighbourhood
score (NS).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.evaluate.outputs import Forced, Outputs, Pair
from pipeline.evaluate.scores import METRICS, mean
from pipeline.facts.fact import Fact

_NEIGHBOURS = "neighborhood"
"""The kind of ROME's neighbourhood prompts: another subject, whose right answer is the fact's own old one."""

Logprobs = dict[str, float]
"""The log-likelihoods of the `new` and of the `old` answer to one question, in nats a token."""


def pairs(fact: Fact) -> Iterator[Pair]:
    """The (question, answer) pairs that `score` looks at; none without an old answer to compare with."""
    if fact.old_answer is not None:
        for question in [fact.prompt, *fact.rephrasings, *_neighbours(fact)]:
            yield question, fact.new_answer
            yield question, fact.old_answer


def score(fact: Fact, outputs: Outputs, reference: dict[str, Any] | None) -> dict[str, Any]:
    """The record's scores, and the log-likelihoods that they come from.

    `reference` is not used: the neighbourhood score looks at one model alone.
    """
    if fact.old_answer is None:
        return {
            "scores": dict.fromkeys(METRICS["probability"]),
            "logprobs": [],
            "rephrasings": [],
            "neighbours": [],
        }
    logprobs = _logprobs(fact, [fact.prompt], outputs.forced)
    rephrasings = _logprobs(fact, fact.rephrasings, outputs.forced)
    neighbours = _logprobs(fact, _neighbours(fact), outputs.forced)
    # Under this protocol the old answer leaks exactly where it is preferred.
    prefers_old = _share_higher("old", "new", logprobs)
    scores = {
        "reliability": _share_higher("new", "old", logprobs),
        "generality": _share_higher("new", "old", rephrasings),
        "locality": _share_higher("old", "new", neighbours),
        "portability": None,
        "leakage": prefers_old,
        "old_reliability": prefers_old,
    }
    return {"scores": scores, "logprobs": logprobs, "rephrasings": rephrasings, "neighbours": neighbours}


def _neighbours(fact: Fact) -> list[str]:
    return [probe.prompt for probe in fact.locality if probe.kind == _NEIGHBOURS]


def _logprobs(fact: Fact, questions: list[str], forced: Mapping[Pair, Forced]) -> list[Logprobs]:
    assert fact.old_answer is not None
    found = []
    for question in questions:
        new, old = forced[question, fact.new_answer], forced[question, fact.old_answer]
        found.append({"new": new.logprob, "old": old.logprob})
    return found


def _share_higher(higher: str, lower: str, logprobs: list[Logprobs]) -> float | None:
    """Share of questions for which one answer is strictly likelier than the other; None without questions."""
    return mean([float(one[higher] > one[lower]) for one in logprobs])
