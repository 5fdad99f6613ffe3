"""How a question becomes the model's input: the same for training and for evaluation.

Prompt and answer are tokenised together, as one text, and split by character offsets: an answer tokenised alone gets
another first token (a BOS, or a lost leading space) in most tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Token ids of a question and its answer; `ids[answer_start:]` are the answer's (and EOS's, if asked for)."""

    ids: list[int]
    answer_start: int


class Prompter:
    """Encodes questions for one tokenizer and one template. Raises InputError if the tokenizer has no EOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
        raise NotImplementedError

    def question(self, question: str) -> str:
        """The text that comes before the answer, without special tokens that the tokenizer adds itself."""
        raise NotImplementedError

    def encode_question(self, question: str) -> list[int]:
        """Ids of the question alone, for generation."""
        raise NotImplementedError

    def encode(self, question: str, answer: str, eos: bool) -> Encoded:
        """Ids of question and answer, tokenised as one text; with `eos`, the EOS token at the end."""
        raise NotImplementedError
