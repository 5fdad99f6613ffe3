"""A loaded model that is asked about facts: batched, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config import Evaluate
from pipeline.errors import InputError
from pipeline.evaluate.forced import force
from pipeline.evaluate.forward import Forward
from pipeline.evaluate.generate import Generator
from pipeline.evaluate.outputs import Outputs, Pair
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.facts.fact import Fact
from pipeline.facts.prompts import Prompter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Respondent:
    """Answers for `model`; `outputs` holds all that it has said so far."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, prompter: Prompter, settings: Evaluate) -> None:
        self.outputs = Outputs()
        self._forward = Forward(model)
        self._prompter = prompter
        self._protocols = [PROTOCOLS[name] for name in settings.protocols]
        self._batch_size = settings.batch_size
        self._generator = Generator(self._forward, tokenizer, settings.batch_size, settings.max_new_tokens)

    def ask(self, facts: Sequence[Fact]) -> None:
        """Have `outputs` hold everything that the protocols want to know about `facts`.

        Raises InputError for a text longer than the model's positions, FloatingPointError for logits that are not numbers;
        both name the record.
        """
        self._force({pair: fact.id for fact in facts for protocol in self._protocols for pair in protocol.pairs(fact)})
        self._generate({question: fact.id for fact in facts for protocol in self._protocols for question in protocol.questions(fact)})

    def _force(self, owners: dict[Pair, str]) -> None:
        pairs = [pair for pair in owners if pair not in self.outputs.forced]
        names = [owners[pair] for pair in pairs]
        encoded = self._prompter.encode_many(pairs, eos=False)
        self._check_lengths([record.ids for record in encoded], names)
        self.outputs.forced.update(zip(pairs, force(self._forward, encoded, names, self._batch_size), strict=True))

    def _generate(self, owners: dict[str, str]) -> None:
        questions = [question for question in owners if question not in self.outputs.generated]
        names = [owners[question] for question in questions]
        prompts = [self._prompter.encode_question(question) for question in questions]
        self._check_lengths(prompts, names)
        self.outputs.generated.update(zip(questions, self._generator.generate(prompts, names), strict=True))

    def _check_lengths(self, texts: Iterable[list[int]], names: list[str]) -> None:
        limit = self._forward.max_positions
        for ids, name in zip(texts, names, strict=True):
            if limit is not None and len(ids) > limit:
                raise InputError(f"record {name}: {len(ids)} tokens are more than the model's {limit} positions; drop or shorten this fact")
