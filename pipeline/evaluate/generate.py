"""Free greedy decoding of many questions at once: the first line that the model writes after each.

A line does not depend on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.evaluate.forward import Reading


class Line:
    """What a model has written so far, up to EOS, the end of the first line with text, or `budget` tokens."""

    def __init__(self, budget: int) -> None:
        self.ids: list[int] = []
        self._budget = budget
        self._text = ""

    def add(self, token: int, piece: str, is_eos: bool) -> bool:
        """Take the next token, whose own text is `piece`; returns whether the line goes on after it."""
        if is_eos:
            return False
        self.ids.append(token)
        # Many models open with a newline: only one after some text ends the line.
        self._text = (self._text + piece).lstrip()
        return "\n" not in self._text and len(self.ids) < self._budget


class Generator:
    """Writes lines token by token, always the likeliest one. `eos` are the tokens that end a line.

    Most lines end soon and some are long: new questions join the batch while the long ones are being written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos: set[int]) -> None:
        self._tokenizer: Any = tokenizer
        self._eos = eos
        self._pieces: dict[int, str] = {}
        self._reading: Reading | None = None
        self._unfinished: list[Line] = []  # one for each text of `_reading`, in its order

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
        # The last token may hold more than the newline that ended the line.
        return text.lstrip().partition("\n")[0].rstrip()

    def _step(self, reading: Reading) -> Reading | None:
        """One more token for every unfinished line."""
        tokens = reading.logits.argmax(-1)
        going_on = []
        for i, (line, token) in enumerate(zip(self._unfinished, tokens.tolist(), strict=True)):
            if line.add(token, self._piece(token), token in self._eos):
                going_on.append(i)
        self._unfinished = [self._unfinished[i] for i in going_on]
        if not going_on:
            return None
        # Selecting copies the cache: only when a line has ended.
        if len(going_on) < len(tokens):
            reading, tokens = reading.select(going_on), tokens[going_on]
        column = tokens[:, None]
        where = torch.arange(len(tokens), device=tokens.device)
        reading.logits = reading.extend(column, torch.ones_like(column), where)
        return reading

    def _piece(self, token: int) -> str:
        # Decoding a whole line after each of its tokens would be quadratic; the pieces tell where it ends.
        if token not in self._pieces:
            self._pieces[token] = self._tokenizer.decode([token])
        return self._pieces[token]
