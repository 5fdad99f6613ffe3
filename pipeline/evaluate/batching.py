"""Batches of token rows: similar lengths together, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of `lengths` in batches, longest first: if the memory does not suffice, that shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, width) int64, with every row's last token in the last column."""
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, width - len(row) :] = torch.tensor(row)
        attention_mask[i, width - len(row) :] = 1
    return input_ids, attention_mask


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Each token's place in its own text, whatever padding stands before it: (rows, width) int64, 0 on padding."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
