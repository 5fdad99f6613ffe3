"""The table of protocols: what each asks of the model, and how it scores a record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from pipeline.evaluate.outputs import Outputs, Pair
from pipeline.evaluate.protocols import generation, probability, token
from pipeline.facts.fact import Fact

Json = dict[str, Any]


class Protocol(NamedTuple):
    """One way of scoring a model."""

    pairs: Callable[[Fact], Iterable[Pair]]
    """The (question, answer) pairs to be forced."""
    questions: Callable[[Fact], Iterable[str]]
    """The questions to be answered freely."""
    score: Callable[[Fact, Outputs, Json | None], Json]
    """`score(fact, outputs, reference)`: `scores` by metric (None: there is none), and raw outputs.

    `reference` is what it returned for the same fact and the original model; None for the original itself.
    """


def _nothing(fact: Fact) -> Iterator[Any]:
    return iter(())


PROTOCOLS: dict[str, Protocol] = {
    "token": Protocol(token.pairs, _nothing, token.score),
    "probability": Protocol(probability.pairs, _nothing, probability.score),
    "generation": Protocol(_nothing, generation.questions, generation.score),
}
