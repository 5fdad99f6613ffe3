"""What forward passes are made of: batches by length, padding on either side, positions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate.forward import batches_by_length, pad, positions_of


@given(st.lists(st.integers(1, 60)), st.integers(1, 8))
def test_every_row_is_in_one_batch_that_is_at_most_half_padding(lengths: list[int], batch_size: int) -> None:
    batches = list(batches_by_length(lengths, batch_size))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert all(2 * min(lengths[i] for i in batch) >= max(lengths[i] for i in batch) for batch in batches)
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


def test_padding_and_positions() -> None:
    rows = [[5, 6, 7], [8]]
    input_ids, attention_mask = pad(rows, "left")
    assert input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions_of(attention_mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    input_ids, attention_mask = pad(rows, "right")
    assert input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
