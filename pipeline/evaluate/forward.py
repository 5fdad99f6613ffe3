"""Forward passes of any causal language model over batches of texts.

A batch of questions is read once; its answers and its free generations then follow from the same cache.
Answers are short, so reading the questions is most of the work.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import DynamicCache

from pipeline.models.targets import TargetLogits


class Forward:
    """Calls `model` with the arguments that its architecture takes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._accepted = inspect.signature(model.forward).parameters
        # transformers renamed the argument within its version 5.
        self._cache_name = "cache" if "cache" in self._accepted else "past_key_values"
        self.device = model.device

    @property
    def max_positions(self) -> int | None:
        """The longest text that the model was made for, in tokens; None without such a limit (ALiBi)."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a text according to the model's makers (a chat model may have several)."""
        ids = getattr(getattr(self._model, "generation_config", None), "eos_token_id", None)
        if ids is None:
            return []
        return ids if isinstance(ids, list) else [ids]

    def new_cache(self) -> Any:
        """An empty key-value cache of the kind that the model wants."""
        return DynamicCache(config=self._model.config)

    def read(self, questions: Sequence[Sequence[int]], names: Sequence[str]) -> Reading:
        """Read a batch of `questions`, given as token ids. `names` are their facts' ids, for errors."""
        # On the left, so that every question ends in the last column: what follows is one column for all.
        input_ids, mask = (tensor.to(self.device) for tensor in pad(questions, "left"))
        reading = Reading(self, self.new_cache(), mask[:, :0], list(names))
        last = torch.arange(1, len(questions) + 1, device=self.device) * input_ids.shape[1] - 1
        reading.logits = reading.extend(input_ids, mask, last)
        return reading

    def logits_at(
        self, where: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Logits (len(where), vocabulary) in fp32 at flat positions of `input_ids` (rows, width).

        `attention_mask` is (rows, cached + width); `cache` grows by `width`.
        """
        arguments: dict[str, Any] = {self._cache_name: cache, "use_cache": True}
        # GPT-2 and Llama would count padding as positions. BLOOM takes none: ALiBi works from the mask.
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
        """Some of the texts, each as often as it is in `rows`, as a new reading; this one stays as it is."""
        indices = torch.tensor(rows, dtype=torch.long, device=self._attention_mask.device)
        # Shallow copies are enough: selecting replaces a layer's tensors, and changes none in place.
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(indices)
        names = [self.names[row] for row in rows]
        selected = Reading(self._forward, cache, self._attention_mask[indices], names)
        selected.logits = self.logits[indices]
        return selected

    def join(self, other: Reading) -> Reading:
        """The texts of both, in one batch.

        Both must be padded on the left only: nothing right-padded was read since `Forward.read`.
        """
        masks = [self._attention_mask, other._attention_mask]
        # The longest text that is left: where longer ones have ended, the padding beside them goes.
        width = max(int(mask.sum(-1).max()) for mask in masks)
        cache = self._forward.new_cache()
        for i, layers in enumerate(zip(self._cache.layers, other._cache.layers, strict=True)):
            keys = torch.cat([_fit(layer.keys, width) for layer in layers])
            values = torch.cat([_fit(layer.values, width) for layer in layers])
            cache.update(keys, values, i)
        mask = torch.cat([_fit(mask[:, :, None], width).squeeze(-1) for mask in masks])
        joined = Reading(self._forward, cache, mask, self.names + other.names)
        joined.logits = torch.cat([self.logits, other.logits])
        return joined

    def extend(self, input_ids: torch.Tensor, mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Read on: `input_ids` and `mask`, both (texts, width).

        Returns the logits at the flat positions `where` of `input_ids`. Raises FloatingPointError if they are
        not finite.
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
                f"record {name}: the model's logits are not finite: "
                "its training diverged, or bf16 is too narrow for it"
            )


def _fit(states: torch.Tensor, width: int) -> torch.Tensor:
    """(..., tokens, size) with `width` tokens: padding on the left is added or taken away."""
    states = states[..., -width:, :]
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of `lengths` in batches of similar lengths, so that little of a batch is padding.

    No row is less than half as long as another in its batch: a few long texts must not pad all the short
    ones.
    """
    batch: list[int] = []
    # Longest first: if the memory does not suffice, that shows at once.
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or 2 * lengths[i] < lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], side: Literal["left", "right"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, width) int64."""
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)  # padding is masked out: any token will do
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(len(row))
        input_ids[i, columns] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, columns] = 1
    return input_ids, attention_mask


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Each token's place in its own text, padding not counted: (rows, width) int64, 0 on padding."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
