"""Free greedy decoding of many questions at once: the first line that the model writes, whatever it shares
its batch with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipeline.evaluate.forward import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Line:
    """What a model has written so far, up to EOS, the end of the first line with text in it, or `budget`
    tokens.
    """

    def __init__(self, budget: int) -> None:
        self.ids: list[int] = []
        self._budget = budget
        self._text = ""

    def add(self, token: int, piece: str, is_eos: bool) -> bool:
        """Take the next token, whose own text is `piece`; whether the line goes on after it."""
        if is_eos:
            return False
        self.ids.append(token)
        self._text = (self._text + piece).lstrip()
        return "\n" not in self._text and len(self.ids) < self._budget


class Generator:
    """Writes lines, one token after the other, each the likeliest. `eos` ends a line; nothing else is forced
    or forbidden.

    Most lines end soon and some are long: new questions join the batch while those are still being written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos: set[int]) -> None:
        self._tokenizer: Any = tokenizer
        self._eos = eos
        self._pieces: dict[int, str] = {}
        self._reading: Reading | None = None
        self._unfinished: list[Line] = []

    def add(self, reading: Reading, budgets: Sequence[int]) -> list[Line]:
        """Begin a line after each text of `reading`, of at most so many tokens. `write` completes them."""
        lines = [Line(budget) for budget in budgets]
        self._reading = reading if self._reading is None else self._reading.join(reading)
        self._unfinished += lines
        return lines

    def write(self, leave: int = 0) -> None:
        """Write until at most `leave` lines are unfinished. A line that has ended leaves the batch."""
        while self._reading is not None and len(self._unfinished) > leave:
            self._reading = self._step(self._reading)

    def text(self, line: Line) -> str:
        """What a finished line says, without blanks around it."""
        text: str = self._tokenizer.decode(line.ids, skip_special_tokens=True)
        return text.lstrip().partition("\n")[0].rstrip()

    def _step(self, reading: Reading) -> Reading | None:
        """One more token for every unfinished line."""
        tokens = reading.logits.argmax(-1)
        lines = zip(self._unfinished, tokens.tolist(), strict=True)
        going_on = [
            i
            for i, (line, token) in enumerate(lines)
            if line.add(token, self._piece(token), token in self._eos)
        ]
        self._unfinished = [self._unfinished[i] for i in going_on]
        if not going_on:
            return None
        if len(going_on) < len(tokens):
            reading, tokens = reading.select(going_on), tokens[going_on]
        column = tokens[:, None]
        reading.logits = reading.extend(
            column, torch.ones_like(column), torch.arange(len(tokens), device=tokens.device)
        )
        return reading

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._tokenizer.decode([token])
        return self._pieces[token]
