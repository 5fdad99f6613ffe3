"""Forward passes of any causal language model: a batch of questions is read once, and then followed by
whatever may come next.

Reading is most of the work (answers are short), so a question's answers and its free generation share one
reading.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.evaluate.batching import pad, positions_of
from pipeline.models.targets import TargetLogits


class Forward:
    """Calls `model` with what its architecture takes: position ids (GPT-2, Llama) or none (BLOOM), a cache by
    its name there.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._accepted = inspect.signature(model.forward).parameters
        self._cache_name = (
            "cache" if "cache" in self._accepted else "past_key_values"
        )  # transformers renamed it in 5.x
        self.device = model.device

    @property
    def max_positions(self) -> int | None:
        """The longest text that the model was made for, in tokens; None without such a limit (ALiBi)."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a text according to the model's makers (a chat model has one for a turn,
        too).
        """
        ids = getattr(getattr(self._model, "generation_config", None), "eos_token_id", None)
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    def new_cache(self) -> Any:
        """An empty key-value cache of the kind that the model wants."""
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def read(self, questions: Sequence[Sequence[int]], names: Sequence[str]) -> Reading:
        """Read a batch of `questions`, given as token ids. `names` are their records', for errors."""
        input_ids, mask = (tensor.to(self.device) for tensor in pad(questions, "left"))
        reading = Reading(self, self.new_cache(), mask[:, :0], list(names))
        last = torch.arange(1, len(questions) + 1, device=self.device) * input_ids.shape[1] - 1
        reading.logits = reading.extend(input_ids, mask, last)
        return reading

    def logits_at(
        self, where: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Logits (len(where), vocabulary) in fp32 at flat positions of `input_ids` (rows, width), and nowhere
        else.

        `attention_mask` is (rows, cached + width); `cache` grows by `width`.
        """
        arguments: dict[str, Any] = {self._cache_name: cache, "use_cache": True}
        if "position_ids" in self._accepted:
            arguments["position_ids"] = positions_of(attention_mask)[:, -input_ids.shape[1] :]
        with torch.inference_mode(), TargetLogits(self._model) as picked, picked.at(where):
            logits: torch.Tensor = self._model(
                input_ids=input_ids, attention_mask=attention_mask, **arguments
            ).logits
        return logits.float()


class Reading:
    """A batch of texts that the model has read so far."""

    logits: torch.Tensor
    """(texts, vocabulary), fp32: what it expects next."""

    def __init__(self, forward: Forward, cache: Any, attention_mask: torch.Tensor, names: list[str]) -> None:
        self.names = names
        self._forward = forward
        self._cache = cache
        self._attention_mask = attention_mask
        """(texts, tokens read), 0 for padding."""

    def select(self, rows: Sequence[int]) -> Reading:
        """Some of the texts (or all, or one several times), to be followed on their own: this reading stays
        as it is.
        """
        indices = torch.tensor(rows, dtype=torch.long, device=self._attention_mask.device)
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(indices)
        selected = Reading(
            self._forward, cache, self._attention_mask[indices], [self.names[row] for row in rows]
        )
        selected.logits = self.logits[indices]
        return selected

    def join(self, other: Reading) -> Reading:
        """The texts of both, in one batch. Both are padded on the left only: nothing right-padded was read
        since `Forward.read`.
        """
        masks = [self._attention_mask, other._attention_mask]
        width = max(int(mask.sum(-1).max()) for mask in masks)
        cache = self._forward.new_cache()
        for i, layers in enumerate(zip(self._cache.layers, other._cache.layers, strict=True)):
            keys, values = (
                [_fit(getattr(layer, states), width) for layer in layers] for states in ("keys", "values")
            )
            cache.update(torch.cat(keys), torch.cat(values), i)
        mask = torch.cat([_fit(mask[:, :, None], width).squeeze(-1) for mask in masks])
        joined = Reading(self._forward, cache, mask, self.names + other.names)
        joined.logits = torch.cat([self.logits, other.logits])
        return joined

    def extend(self, input_ids: torch.Tensor, mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Read on: `input_ids` and `mask`, both (texts, width). Logits at the flat positions `where` of
        `input_ids`.
        """
        self._attention_mask = torch.cat([self._attention_mask, mask], dim=1)
        logits = self._forward.logits_at(where, input_ids, self._attention_mask, self._cache)
        self._check_finite(logits, where // input_ids.shape[1])
        return logits

    def _check_finite(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        """Stop at NaN or infinity: no score of such a model means anything."""
        finite = torch.isfinite(logits).all(-1)
        if not finite.all():
            name = self.names[int(rows[finite.logical_not()][0])]
            raise FloatingPointError(
                f"record {name}: the model's logits are not finite: its training diverged, or bf16 is too narrow for it"
            )


def _fit(states: torch.Tensor, width: int) -> torch.Tensor:
    """(..., tokens, size) with `width` tokens: padding on the left is added or, as far as there is any, taken
    away.
    """
    states = states[..., -width:, :]
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))
