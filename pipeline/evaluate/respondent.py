"""A loaded model that is asked about facts: in batches, each question read once, nothing computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.config import Evaluate
from pipeline.errors import InputError
from pipeline.evaluate.forward import Forward, Reading, batches_by_length, pad
from pipeline.evaluate.generate import Generator, Line
from pipeline.evaluate.outputs import Forced, Outputs, Pair
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.facts.fact import Fact
from pipeline.facts.prompts import Prompter


@dataclass
class Question:
    """A question's tokens, and what shall follow them."""

    ids: list[int]
    record: str
    """The id of a fact that asks it, for errors."""
    answers: dict[Pair, list[int]] = field(default_factory=dict)
    """Tokens of the answers to be forced."""
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
        not finite; both name the fact.
        """
        questions = self._questions(facts)
        lines: dict[str, Line] = {}
        for chosen in batches_by_length([len(question.ids) for question in questions], self._batch_size):
            lines |= self._answer([questions[i] for i in chosen])
            # Long lines wait for company: a pass over few rows costs nearly as much as over many.
            self._generator.write(leave=self._batch_size)
        self._generator.write()
        self.outputs.generated.update({text: self._generator.text(line) for text, line in lines.items()})

    def _questions(self, facts: Sequence[Fact]) -> list[Question]:
        """What is not in `outputs` yet. Questions are the same if their tokens are."""
        pairs: dict[Pair, str] = {}
        texts: dict[str, str] = {}
        for fact in facts:
            for protocol in self._protocols:
                pairs.update(dict.fromkeys(protocol.pairs(fact), fact.id))
                texts.update(dict.fromkeys(protocol.questions(fact), fact.id))
        found: dict[tuple[int, ...], Question] = {}

        def question(ids: list[int], record: str) -> Question:
            return found.setdefault(tuple(ids), Question(ids, record))

        new_pairs = [pair for pair in pairs if pair not in self.outputs.forced]
        for pair, encoded in zip(new_pairs, self._prompter.encode_many(new_pairs, eos=False), strict=True):
            self._check_length(encoded.ids, pairs[pair])
            start = encoded.answer_start
            question(encoded.ids[:start], pairs[pair]).answers[pair] = encoded.ids[start:]
        for text in (text for text in texts if text not in self.outputs.generated):
            ids = self._prompter.encode_question(text)
            self._check_length(ids, texts[text])
            question(ids, texts[text]).free.append(text)
        return list(found.values())

    def _answer(self, questions: list[Question]) -> dict[str, Line]:
        """Read the questions, judge the answers to them, and begin the free ones: {text: line}."""
        names = [question.record for question in questions]
        reading = self._forward.read([question.ids for question in questions], names)
        pairs: list[Pair] = []
        answers: list[tuple[int, list[int]]] = []
        for row, question in enumerate(questions):
            for pair, ids in question.answers.items():
                pairs.append(pair)
                answers.append((row, ids))
        self.outputs.forced.update(zip(pairs, force(reading, answers, self._batch_size), strict=True))
        rows = [row for row, question in enumerate(questions) if question.free]
        if not rows:
            return {}
        lines = self._generator.add(reading.select(rows), [self._budget(questions[row]) for row in rows])
        return {text: line for row, line in zip(rows, lines, strict=True) for text in questions[row].free}

    def _budget(self, question: Question) -> int:
        """New tokens for `question`, within the model's positions."""
        limit = self._forward.max_positions
        if limit is None:
            return self._max_new_tokens
        # One more than there are places left: the last token is written, but never read.
        return min(self._max_new_tokens, limit - len(question.ids) + 1)

    def _check_length(self, ids: list[int], record: str) -> None:
        limit = self._forward.max_positions
        if limit is not None and len(ids) > limit:
            raise InputError(
                f"record {record}: {len(ids)} tokens are more than the model's {limit} positions; "
                "drop or shorten this fact"
            )


def force(reading: Reading, answers: Sequence[tuple[int, list[int]]], batch_size: int) -> list[Forced]:
    """Teacher forcing: what the model would have said at each token of answers put into its mouth.

    Each of `answers` is (row of the question in `reading`, the answer's token ids); one `Forced` for each.
    """
    results: dict[int, Forced] = {}
    for chosen in batches_by_length([len(ids) for _, ids in answers], batch_size):
        rows = [answers[i][0] for i in chosen]
        batch = [answers[i][1] for i in chosen]
        results.update(zip(chosen, _force_batch(reading.select(rows), batch), strict=True))
    return [results[i] for i in range(len(answers))]


def _force_batch(reading: Reading, answers: list[list[int]]) -> list[Forced]:
    """`answers[i]` follows the i-th text of `reading`."""
    predictions = [logits[None] for logits in reading.logits]  # of each answer's first token
    if max(len(ids) for ids in answers) > 1:
        # The last token predicts nothing that is asked for, so it is not read.
        rest = _following(reading, [ids[:-1] for ids in answers])
        predictions = [torch.cat(pair) for pair in zip(predictions, rest, strict=True)]
    return [_judge(logits, ids) for logits, ids in zip(predictions, answers, strict=True)]


def _following(reading: Reading, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits (len(row), vocabulary) after each token of each row."""
    # On the right, where a causal model cannot see the padding: results do not depend on the batch.
    input_ids, mask = (tensor.to(reading.logits.device) for tensor in pad(rows, "right"))
    logits = reading.extend(input_ids, mask, mask.flatten().nonzero().squeeze(-1))
    return list(logits.split([len(row) for row in rows]))


def _judge(logits: torch.Tensor, ids: list[int]) -> Forced:
    targets = torch.tensor(ids, device=logits.device)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return Forced(ids, logits.argmax(-1).tolist(), logprobs.mean().item())
