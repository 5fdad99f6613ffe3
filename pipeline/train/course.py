"""What is trained on, in which order and how fast: beside the first weights, all that decides a result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, cos, pi
from typing import Literal

from pipeline.errors import InputError
from pipeline.facts.fact import Fact
from pipeline.facts.prompts import Encoded, Prompter
from pipeline.train.batches import Batches, Split
from pipeline.training_config import Training

Target = Literal["old", "new", "old_and_locality"]


@dataclass(frozen=True)
class Record:
    """One example: token ids of question, answer and EOS; the loss is on answer and EOS alone."""

    id: str
    """The fact's, so that an error can name it."""
    encoded: Encoded

    @property
    def num_tokens(self) -> int:
        return len(self.encoded.ids)

    @property
    def num_targets(self) -> int:
        return len(self.encoded.ids) - self.encoded.answer_start


@dataclass(frozen=True)
class Course:
    """All steps of one training. The same course gives the same steps on a new engine and on a used one."""

    records: Sequence[Record]
    training: Training
    """The settings; nothing else keeps a copy of them."""
    seed: int
    num_ranks: int

    @cached_property
    def batches(self) -> Batches:
        lengths = tuple(record.num_tokens for record in self.records)
        return Batches(lengths, self.training.batch_size, self.training.epochs, self.seed)

    @cached_property
    def split(self) -> Split:
        return Split.of(self.training.batch_size, self.training.micro_batch_size, self.num_ranks)

    @property
    def num_steps(self) -> int:
        return self.batches.num_steps

    def lr(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        training = self.training
        return learning_rate(step, self.num_steps, training.lr, training.schedule, training.warmup_ratio)


def learning_rate(
    step: int,
    num_steps: int,
    peak: float,
    schedule: Literal["constant", "linear", "cosine"],
    warmup_ratio: float,
) -> float:
    """The rate of step `step` of `num_steps` (from 0): warmup, then `schedule`, which decays to zero.

    Warmup rises linearly over the first `warmup_ratio` of the steps and reaches `peak` with its last one. No
    step has rate 0.
    """
    num_warmup = ceil(num_steps * warmup_ratio)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / (num_steps - num_warmup)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * (1 + cos(pi * progress)) / 2
    return peak


def training_records(
    facts: Iterable[Fact], target: Target, prompter: Prompter, max_length: int, num_positions: int | None
) -> list[Record]:
    """The records of `facts`, with their old or their new answers.

    `old_and_locality` adds every unrelated question once. `num_positions` is how many tokens the model has
    positions for; None: no limit. Raises InputError, naming the fact, for a record longer than `max_length`
    or than the model takes.
    """
    asked = list(_questions(list(facts), target))
    if not asked:
        raise InputError("no facts left to train on: see what the facts stage dropped (flearn facts inspect)")
    encoded = prompter.encode_many([(question, answer) for _, question, answer in asked], eos=True)
    records = [Record(id, one) for (id, _, _), one in zip(asked, encoded, strict=True)]
    for record in records:
        _check(record, max_length, num_positions)
    return records


def _questions(facts: list[Fact], target: Target) -> Iterator[tuple[str, str, str]]:
    """(fact's id, question, answer) of every record."""
    for fact in facts:
        answer = fact.new_answer if target == "new" else fact.old_answer
        assert answer is not None, f"{fact.id} has no old answer: the facts stage drops such facts"
        yield fact.id, fact.prompt, answer
    if target == "old_and_locality":
        seen = {fact.prompt for fact in facts}
        for fact in facts:
            for probe in fact.locality:
                if probe.prompt not in seen:
                    seen.add(probe.prompt)
                    yield fact.id, probe.prompt, probe.answers[0]


def _check(record: Record, max_length: int, num_positions: int | None) -> None:
    if record.num_tokens > max_length:
        raise InputError(
            f"fact {record.id}: {record.num_tokens} tokens, more than max_length {max_length}; raise it, or"
            " drop this fact"
        )
    if num_positions is not None and record.num_tokens > num_positions:
        raise InputError(
            f"fact {record.id}: {record.num_tokens} tokens, but the model has {num_positions} positions;"
            " drop this fact"
        )
    if record.encoded.answer_start == 0:
        raise InputError(
            f"fact {record.id}: no token before its answer; set prompt.add_bos or another prompt.template"
        )
