"""How a question becomes the model's input: the same for training and for evaluation.

Question and answer are tokenised together, as one text, and split by character offsets. Tokenised alone, an
answer would get another first token in most tokenizers: a BOS, or one without the leading blank.

The question ends before the blank that separates it from the answer. So a generated answer begins with the
same token (` Paris`) as a trained one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from pipeline.config import Prompt
from pipeline.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stanford Alpaca's prompt for an instruction without input. The answer follows the colon without a blank.
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:"
)

# Some chat templates write today's date, or open a chain of thought: a new text each day, or no short answer.
_CHAT_SETTINGS: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}


@dataclass(frozen=True)
class Encoded:
    """Token ids of a question and its answer."""

    ids: list[int]
    answer_start: int
    """`ids[answer_start:]` are the answer's, and EOS where it was asked for."""


class Prompter:
    """Encodes questions for one tokenizer and one template.

    Raises InputError for a tokenizer without EOS or without character offsets (a slow one), for a BOS or chat
    template that `prompt` asks for and the tokenizer lacks, and for a template without `{prompt}`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
        _require_usable(tokenizer, prompt)
        self._tokenizer: Any = tokenizer
        self._template = {"plain": "{prompt}", "alpaca": _ALPACA}.get(prompt.template, prompt.template)
        self._is_chat = prompt.template == "chat"
        if not self._is_chat and "{prompt}" not in self._template:
            raise InputError(
                f"prompt.template: {prompt.template!r} is none of plain, alpaca, chat "
                "and has no {prompt} in it"
            )
        self._add_bos = prompt.add_bos
        # A chat template writes its special tokens as text, so the tokenizer must not put its own before it.
        self._prefix = [] if self._is_chat else self._own_prefix()
        self._separator = self._find_separator(prompt.template)

    def question(self, question: str) -> str:
        """The text before the answer, without the special tokens that the tokenizer adds itself.

        It ends before the blanks (not newlines) that separate it from the answer.
        """
        return self._fill(question).rstrip(" ")

    def encode_question(self, question: str) -> list[int]:
        """Ids of the question alone, for generation."""
        body: list[int] = self._tokenizer(self.question(question), add_special_tokens=False)["input_ids"]
        return self._open(body)

    def encode(self, question: str, answer: str, eos: bool) -> Encoded:
        """Ids of question and answer, tokenised as one text; with `eos`, the EOS token at the end.

        A token that holds both the question's end and the answer's beginning belongs to the answer. Blanks
        around the answer do not count. Raises InputError for an empty answer.
        """
        return self.encode_many([(question, answer)], eos)[0]

    def encode_many(self, pairs: Sequence[tuple[str, str]], eos: bool) -> list[Encoded]:
        """`encode` for many (question, answer) pairs."""
        if not pairs:
            return []
        questions = [self.question(question) for question, _ in pairs]
        texts = []
        for (question, answer), before in zip(pairs, questions, strict=True):
            if not answer.strip():
                raise InputError(f"empty answer to {question!r}: give it one, or drop this fact")
            texts.append(before + self._separator + answer.strip())
        # One call for all: a fast tokenizer encodes a batch in parallel.
        batch = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows = zip(batch["input_ids"], batch["offset_mapping"], questions, pairs, strict=True)
        return [self._split(ids, offsets, len(before), eos, pair) for ids, offsets, before, pair in rows]

    def _split(
        self, body: list[int], offsets: list[tuple[int, int]], boundary: int, eos: bool, pair: tuple[str, str]
    ) -> Encoded:
        """`boundary` is the question's length in characters.

        The first token that ends beyond it opens the answer. By its start, a token that also holds the
        question's end would be the question's, and the answer would lack its beginning.
        """
        num_question = next((i for i, (_, end) in enumerate(offsets) if end > boundary), len(body))
        if num_question == len(body):
            raise InputError(
                f"the tokenizer makes no token of the answer {pair[1]!r} to {pair[0]!r}; drop this fact"
            )
        ids = self._open(body)
        start = num_question + len(ids) - len(body)  # `_open` may have put tokens before, or taken one away
        if eos and ids[-1] != self._tokenizer.eos_token_id:
            ids = [*ids, self._tokenizer.eos_token_id]
        return Encoded(ids, start)

    def _fill(self, question: str) -> str:
        question = question.strip()
        if not self._is_chat:
            # Not str.format: a template or a question may hold other braces.
            return self._template.replace("{prompt}", question)
        return self._render_chat([{"role": "user", "content": question}], add_generation_prompt=True)

    def _render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **_CHAT_SETTINGS
        )
        assert isinstance(text, str)
        return text

    def _find_separator(self, template: str) -> str:
        """What joins question and answer: the template's own blanks, or else what is usual for it."""
        filled = self._fill("question")
        blanks = filled[len(filled.rstrip(" ")) :]
        if blanks or template == "alpaca" or filled.endswith("\n"):
            return blanks
        if not self._is_chat:
            return " "
        # A chat template says it by an answered conversation: what stands there between the two.
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        answered = self._render_chat(messages, add_generation_prompt=False)
        gap = answered.removeprefix(filled).partition("answer")[0]
        return "" if gap.strip(" ") else gap

    def _own_prefix(self) -> list[int]:
        """The special tokens that the tokenizer itself puts before a text."""
        # Seen on a text: no attribute says it for every tokenizer.
        opened = self._tokenizer("a", return_special_tokens_mask=True)
        marked = zip(opened["input_ids"], opened["special_tokens_mask"], strict=True)
        return [token for token, _ in takewhile(lambda pair: pair[1], marked)]

    def _open(self, body: list[int]) -> list[int]:
        """`body` with what comes before a text: one BOS, none, or whatever the tokenizer puts there."""
        bos = self._tokenizer.bos_token_id
        has_own = bos is not None and body[:1] == [bos]  # a template may write BOS as text
        if self._add_bos is None:
            return body if has_own else self._prefix + body
        rest = [token for token in self._prefix if token != bos] + (body[1:] if has_own else body)
        return [bos, *rest] if self._add_bos else rest


def _require_usable(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {name} has no EOS token: an answer could not end; "
            "set eos_token in its tokenizer_config.json"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer {name} is a slow one, without character offsets; convert it to a tokenizer.json"
        )
    if prompt.add_bos and tokenizer.bos_token_id is None:
        raise InputError(f"prompt.add_bos: tokenizer {name} has no BOS token; leave add_bos out")
    if prompt.template == "chat" and not tokenizer.chat_template:
        raise InputError(
            f"prompt.template: tokenizer {name} has no chat template; "
            "take plain, alpaca or a text with {prompt}"
        )
