"""One forward pass of any causal language model, with logits only where they are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.evaluate.batching import positions_of
from pipeline.models.targets import TargetLogits


class Forward:
    """Calls `model` with what its architecture takes: position ids (GPT-2, Llama) or none (BLOOM's ALiBi), a cache by its name."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in self._accepted else "past_key_values"  # transformers renamed it in 5.x
        self.device = model.device
        self.config = model.config

    @property
    def max_positions(self) -> int | None:
        """The longest text that the model was made for, in tokens; None without such a limit (ALiBi)."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a text according to the model's makers (a chat model has one for a turn, too)."""
        ids = getattr(getattr(self._model, "generation_config", None), "eos_token_id", None)
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    def logits_at(self, where: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Logits (len(where), vocabulary) in fp32 at flat positions of `input_ids` (rows, width).

        `attention_mask` is (rows, cached + width). `cache`, if given, is read and grows by `width`.
        """
        arguments: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            arguments[self._cache_name] = cache
        if "position_ids" in self._accepted:
            arguments["position_ids"] = positions_of(attention_mask)[:, -input_ids.shape[1] :]
        with torch.inference_mode(), TargetLogits(self._model) as picked, picked.at(where):
            logits = self._model(input_ids=input_ids, attention_mask=attention_mask, **arguments).logits
        return logits.float()


def check_finite(logits: torch.Tensor, names: Sequence[str]) -> None:
    """Stop if a row of `logits` (len(names), vocabulary) holds NaN or infinity: no score of such a model means anything."""
    finite = torch.isfinite(logits).all(-1)
    if not finite.all():
        name = names[int(finite.logical_not().nonzero()[0])]
        raise FloatingPointError(
            f"record {name}: the model's logits are NaN or infinite; its training diverged, or bf16 is too narrow for it"
        )
