"""Batches of token rows: similar lengths together, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of `lengths` in batches, longest first: if the memory does not suffice, that shows at once.

    No row is less than half as long as another in its batch: a few long answers must not pad all the short
    ones.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or 2 * lengths[i] < lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], side: Literal["left", "right"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, width) int64. Padding is masked out, so its token is of no
    account.
    """
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(len(row))
        input_ids[i, columns] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, columns] = 1
    return input_ids, attention_mask


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Each token's place in its own text, whatever padding stands before it: (rows, width) int64, 0 on
    padding.
    """
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
