"""What a model said: teacher-forced answers and free generations, all that the protocols judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Pair = tuple[str, str]
"""A question and an answer that is put into the model's mouth."""


@dataclass(frozen=True)
class Forced:
    """What a model thinks of one answer to one question."""

    targets: list[int]
    """The answer's tokens, without EOS."""
    argmax: list[int]
    """The likeliest token in each target's place, given the question and the targets before it."""
    logprob: float
    """The answer's log-likelihood, in nats a token."""

    @property
    def accuracy(self) -> float:
        """Share of the answer's tokens that are the likeliest."""
        return agreement(self.argmax, self.targets)


@dataclass
class Outputs:
    """Answers by what was asked: a question of two facts, or for two protocols, is asked once."""

    forced: dict[Pair, Forced] = field(default_factory=dict)
    generated: dict[str, str] = field(default_factory=dict)


def agreement(left: Sequence[int], right: Sequence[int]) -> float:
    """Share of equal tokens, place by place."""
    assert len(left) == len(right) > 0
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(left)
