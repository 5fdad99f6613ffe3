"""Logits only where there is a label: hidden states that predict an answer are picked before projection.

Logits of a whole padded batch, over a vocabulary of 32k to 256k, are most of the memory and time of short
records. A hook on the model's own output projection picks, so it works for every architecture, under PEFT and
under ZeRO, and no parameter is renamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import InputError
from pipeline.facts.prompts import Encoded


@dataclass(frozen=True)
class TargetBatch:
    """Right-padded records, and where their answers' tokens are predicted."""

    input_ids: torch.Tensor
    """(records, width), int64."""
    attention_mask: torch.Tensor
    """(records, width), int64: 1 for tokens, 0 for padding."""
    positions: torch.Tensor
    """(targets,), int64: index, in the flattened (records * width) batch, of the token before each target."""
    targets: torch.Tensor
    """(targets,), int64: the answers' tokens, record after record."""
    counts: list[int]
    """Targets of each record, so that `values.split(counts)` gives one piece per record."""

    def to(self, device: torch.device | str) -> TargetBatch:
        """The same batch on `device`."""
        input_ids, attention_mask = self.input_ids.to(device), self.attention_mask.to(device)
        return TargetBatch(
            input_ids, attention_mask, self.positions.to(device), self.targets.to(device), self.counts
        )


def collate(records: Sequence[Encoded], pad_id: int = 0) -> TargetBatch:
    """One batch of `records`.

    Padding is on the right and masked out, so any valid token id may be `pad_id`.
    """
    width = max(len(record.ids) for record in records)
    input_ids = torch.full((len(records), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    positions: list[int] = []
    for row, record in enumerate(records):
        assert 0 < record.answer_start < len(record.ids), "nothing predicts the answer, or it has no token"
        input_ids[row, : len(record.ids)] = torch.tensor(record.ids)
        attention_mask[row, : len(record.ids)] = 1
        # Shifted by one: a token is predicted by the hidden state of the token before it.
        first = row * width
        positions.extend(range(first + record.answer_start - 1, first + len(record.ids) - 1))
    where = torch.tensor(positions)
    counts = [len(record.ids) - record.answer_start for record in records]
    return TargetBatch(input_ids, attention_mask, where, input_ids.flatten()[where + 1], counts)


class TargetLogits:
    """Makes a causal language model (plain, or wrapped by PEFT) compute logits at chosen positions only.

    Outside `at` the model computes them everywhere, as ever; `close` takes the hook off.

    ```
    with TargetLogits(model) as picked, picked.at(batch.positions):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits  # (targets, vocabulary)
    ```
    """

    def __init__(self, model: Any) -> None:
        projection = model.get_output_embeddings()
        if projection is None:
            raise InputError(
                f"{type(model).__name__} has no output embeddings: a causal language model is needed"
            )
        self._positions: torch.Tensor | None = None
        self._handle = projection.register_forward_pre_hook(self._pick)

    def _pick(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._positions is None:
            return None
        hidden, *rest = args
        # By index, not by mask: how many rows a mask picks is known only after waiting for the GPU.
        return (hidden.flatten(0, -2).index_select(0, self._positions), *rest)

    @contextmanager
    def at(self, positions: torch.Tensor) -> Iterator[None]:
        """Within: `.logits` is (len(positions), vocabulary), one row per flat position of the batch."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def close(self) -> None:
        """Give the model its own behaviour back."""
        self._handle.remove()

    def __enter__(self) -> TargetLogits:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
