"""A loaded model that is asked about facts: batched, each question read once, nothing computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config import Evaluate
from pipeline.errors import InputError
from pipeline.evaluate.batching import batches_by_length
from pipeline.evaluate.forced import force
from pipeline.evaluate.forward import Forward
from pipeline.evaluate.generate import Generator, Line
from pipeline.evaluate.outputs import Outputs, Pair
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.facts.fact import Fact
from pipeline.facts.prompts import Prompter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Question:
    """A question's tokens, the answers to be forced after them, and whether the model shall answer freely,
    too.
    """

    ids: list[int]
    record: str
    """The fact that first asked it, for errors."""
    answers: dict[Pair, list[int]] = field(default_factory=dict)
    free: list[str] = field(default_factory=list)
    """The texts of which these are the tokens, if a free answer is wanted."""


class Respondent:
    """Answers for `model`; `outputs` holds all that it has said so far."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompter: Prompter, settings: Evaluate
    ) -> None:
        self.outputs = Outputs()
        self._forward = Forward(model)
        self._prompter = prompter
        self._protocols = [PROTOCOLS[name] for name in settings.protocols]
        self._batch_size = settings.batch_size
        self._max_new_tokens = settings.max_new_tokens
        self._generator = Generator(tokenizer, {tokenizer.eos_token_id, *self._forward.eos_token_ids})

    def ask(self, facts: Sequence[Fact]) -> None:
        """Have `outputs` hold everything that the protocols want to know about `facts`.

        Raises InputError for a text longer than the model's positions, FloatingPointError for logits that are
        not numbers; both name the record.
        """
        questions = self._questions(facts)
        lines: dict[str, Line] = {}
        for chosen in batches_by_length([len(question.ids) for question in questions], self._batch_size):
            lines |= self._answer([questions[i] for i in chosen])
            self._generator.write(leave=self._batch_size)
        self._generator.write()
        self.outputs.generated.update({text: self._generator.text(line) for text, line in lines.items()})

    def _questions(self, facts: Sequence[Fact]) -> list[Question]:
        """What is not in `outputs` yet. Questions are the same if their tokens are."""
        found: dict[tuple[int, ...], Question] = {}

        def question(ids: list[int], record: str) -> Question:
            return found.setdefault(tuple(ids), Question(ids, record))

        pairs = {
            pair: fact.id for fact in facts for protocol in self._protocols for pair in protocol.pairs(fact)
        }
        wanted = [pair for pair in pairs if pair not in self.outputs.forced]
        for pair, encoded in zip(wanted, self._prompter.encode_many(wanted, eos=False), strict=True):
            self._check_length(encoded.ids, pairs[pair])
            start = encoded.answer_start
            question(encoded.ids[:start], pairs[pair]).answers[pair] = encoded.ids[start:]
        texts = {
            text: fact.id
            for fact in facts
            for protocol in self._protocols
            for text in protocol.questions(fact)
        }
        for text in (text for text in texts if text not in self.outputs.generated):
            ids = self._prompter.encode_question(text)
            self._check_length(ids, texts[text])
            question(ids, texts[text]).free.append(text)
        return list(found.values())

    def _answer(self, questions: list[Question]) -> dict[str, Line]:
        """Read the questions, judge the answers to them, and begin the free ones: {text: line}."""
        reading = self._forward.read(
            [question.ids for question in questions], [question.record for question in questions]
        )
        asked = [
            (pair, (row, ids))
            for row, question in enumerate(questions)
            for pair, ids in question.answers.items()
        ]
        forced = force(reading, [answer for _, answer in asked], self._batch_size)
        self.outputs.forced.update({pair: result for (pair, _), result in zip(asked, forced, strict=True)})
        rows = [row for row, question in enumerate(questions) if question.free]
        lines = (
            self._generator.add(reading.select(rows), [self._budget(questions[row]) for row in rows])
            if rows
            else []
        )
        return {text: line for row, line in zip(rows, lines, strict=True) for text in questions[row].free}

    def _budget(self, question: Question) -> int:
        """New tokens for `question`: the last one is never read, so it may lie one place beyond the model's
        last position.
        """
        limit = self._forward.max_positions
        return (
            self._max_new_tokens
            if limit is None
            else min(self._max_new_tokens, limit - len(question.ids) + 1)
        )

    def _check_length(self, ids: list[int], record: str) -> None:
        limit = self._forward.max_positions
        if limit is not None and len(ids) > limit:
            raise InputError(
                f"record {record}: {len(ids)} tokens are more than the model's {limit} positions; drop or shorten this fact"
            )
