"""Batches: every record once an epoch, the same whatever the ranks, little padding, and evenly dealt out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.batches import Batches, Split, micro_batches

LENGTHS = tuple(random.Random(0).choices(range(5, 60), k=103))


def padded(batches: Batches) -> int:
    chosen = [batches.at(step) for step in range(batches.per_epoch)]
    return sum(max(batches.lengths[i] for i in batch) * len(batch) for batch in chosen)


def test_each_epoch_has_every_record_once_in_another_order() -> None:
    batches = Batches(LENGTHS, 10, 3, seed=7)
    assert (batches.per_epoch, batches.num_steps) == (11, 33)
    epochs = [[i for step in range(11) for i in batches.at(epoch * 11 + step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(103)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    groups = [{frozenset(batches.at(epoch * 11 + step)) for step in range(11)} for epoch in range(3)]
    assert groups[0] != groups[1], "the same records would share a batch in every epoch"


def test_the_seed_alone_decides() -> None:
    one, same, other = (Batches(LENGTHS, 10, 2, seed) for seed in (1, 1, 2))
    assert [one.at(step) for step in (15, 3, 21)] == [same.at(step) for step in (15, 3, 21)]
    assert [one.at(step) for step in range(11)] != [other.at(step) for step in range(11)]


def test_like_lengths_share_a_batch() -> None:
    in_file_order = sum(max(LENGTHS[i : i + 10]) * len(LENGTHS[i : i + 10]) for i in range(0, 103, 10))
    assert padded(Batches(LENGTHS, 10, 1, 0)) < 1.15 * sum(LENGTHS) < 0.8 * in_file_order


@pytest.mark.parametrize(
    ("global_size", "micro_size", "ranks", "expected"),
    [
        (64, 4, 1, (4, 16)),
        (64, 4, 4, (4, 4)),
        (5, 2, 2, (2, 2)),
        (3, 8, 2, (2, 1)),
        (1, 4, 8, (1, 1)),
        (32, 16, 2, (16, 1)),
        (10, 4, 2, (3, 2)),
    ],
)
def test_split(global_size: int, micro_size: int, ranks: int, expected: tuple[int, int]) -> None:
    split = Split.of(global_size, micro_size, ranks)
    assert (split.micro_size, split.accumulation) == expected


@given(
    size=st.integers(1, 40),
    global_size=st.integers(1, 40),
    micro_size=st.integers(1, 9),
    ranks=st.integers(1, 5),
)
def test_the_parts_of_all_ranks_make_up_the_batch(
    size: int, global_size: int, micro_size: int, ranks: int
) -> None:
    size = min(size, global_size)
    split = Split.of(global_size, micro_size, ranks)
    parts = [micro_batches(range(size), split, rank) for rank in range(ranks)]
    assert all(len(own) == split.accumulation for own in parts)
    assert sorted(i for own in parts for part in own for i in part) == list(range(size))
    sizes = [len(part) for own in parts for part in own]
    assert max(sizes) <= min(micro_size, split.micro_size) and max(sizes) - min(sizes) <= 1
