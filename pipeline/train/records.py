"""What is trained on: each fact's question and answer as token ids, named so that an error can say which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import InputError
from pipeline.facts.fact import Fact
from pipeline.facts.prompts import Encoded, Prompter

Target = Literal["old", "new", "old_and_locality"]


@dataclass(frozen=True)
class Record:
    """One example: token ids of question, answer and EOS; the loss is on answer and EOS alone."""

    id: str
    encoded: Encoded

    @property
    def num_tokens(self) -> int:
        return len(self.encoded.ids)

    @property
    def num_targets(self) -> int:
        return len(self.encoded.ids) - self.encoded.answer_start


def training_records(
    facts: Iterable[Fact], target: Target, prompter: Prompter, max_length: int, num_positions: int | None
) -> list[Record]:
    """The records of `facts`: with their old or their new answers; `old_and_locality` adds every unrelated
    question once.

    `num_positions` is how many tokens the model has positions for, if that is limited.
    Raises InputError, naming the fact, for a record longer than `max_length` or than the model takes.
    """
    asked = list(_questions(list(facts), target))
    if not asked:
        raise InputError("no facts left to train on: see what the facts stage dropped (flearn facts inspect)")
    encoded = prompter.encode_many([(question, answer) for _, question, answer in asked], eos=True)
    records = [Record(name, one) for (name, _, _), one in zip(asked, encoded, strict=True)]
    for record in records:
        _check(record, max_length, num_positions)
    return records


def _questions(facts: list[Fact], target: Target) -> Iterable[tuple[str, str, str]]:
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
            f"fact {record.id}: {record.num_tokens} tokens, more than max_length {max_length}; raise it, or drop this fact"
        )
    if num_positions is not None and record.num_tokens > num_positions:
        raise InputError(
            f"fact {record.id}: {record.num_tokens} tokens, but the model has {num_positions} positions; drop this fact"
        )
    if record.encoded.answer_start == 0:
        raise InputError(
            f"fact {record.id}: no token before its answer; set prompt.add_bos or another prompt.template"
        )
