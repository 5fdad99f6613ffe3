"""Free greedy decoding of many questions at once: the first line that the model writes, whatever it shares its batch with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipeline.evaluate.batching import batches_by_length, pad_left
from pipeline.evaluate.forward import Forward, check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Line:
    """What a model has written so far, up to EOS, the end of the first line with text in it, or `budget` tokens."""

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
    """Greedy decoding with a key-value cache. Nothing of the model's generation config but its EOS tokens is heeded."""

    def __init__(self, forward: Forward, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_new_tokens: int) -> None:
        self._forward = forward
        self._tokenizer: Any = tokenizer
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._eos = {tokenizer.eos_token_id, *forward.eos_token_ids}
        self._pieces: dict[int, str] = {}

    def generate(self, prompts: Sequence[list[int]], names: Sequence[str]) -> list[str]:
        """The line that follows each prompt, without blanks around it; `names` are the prompts' owners, for errors."""
        lines = [Line(self._budget(prompt)) for prompt in prompts]
        for chosen in batches_by_length([len(prompt) for prompt in prompts], self._batch_size):
            self._generate_batch([prompts[i] for i in chosen], [lines[i] for i in chosen], [names[i] for i in chosen])
        texts = self._tokenizer.batch_decode([line.ids for line in lines], skip_special_tokens=True)
        return [text.lstrip().partition("\n")[0].rstrip() for text in texts]

    def _budget(self, prompt: list[int]) -> int:
        """New tokens for `prompt`: the last one is never fed back, so it may lie one place beyond the model's last position."""
        limit = self._forward.max_positions
        return self._max_new_tokens if limit is None else min(self._max_new_tokens, limit - len(prompt) + 1)

    def _generate_batch(self, prompts: list[list[int]], lines: list[Line], names: list[str]) -> None:
        """Extend each of `lines` to its end. A line that has ended leaves the batch."""
        from transformers import DynamicCache

        device = self._forward.device
        input_ids, attention_mask = (tensor.to(device) for tensor in pad_left(prompts))
        cache = DynamicCache(config=self._forward.config)
        while lines:
            last = torch.arange(1, len(lines) + 1, device=device) * input_ids.shape[1] - 1
            logits = self._forward.logits_at(last, input_ids, attention_mask, cache)
            check_finite(logits, names)
            tokens = logits.argmax(-1)
            going_on = [i for i, token in enumerate(tokens.tolist()) if lines[i].add(token, self._piece(token), token in self._eos)]
            if len(going_on) < len(lines):
                kept = torch.tensor(going_on, dtype=torch.long, device=device)
                lines, names = [lines[i] for i in going_on], [names[i] for i in going_on]
                tokens, attention_mask = tokens[kept], attention_mask[kept]
                cache.batch_select_indices(kept)
            input_ids = tokens[:, None]
            attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=1)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._tokenizer.decode([token])
        return self._pieces[token]
