"""Which records form which batch: decided by the seed alone, never by how many ranks there are.

Records of like length share a batch, so that little is padded. Each batch is then dealt out in equal parts to
the ranks and their micro-steps, neighbours in length side by side.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

_WINDOW_BATCHES = 64
"""Batches that are sorted together: enough for little padding, few enough that an epoch stays well mixed."""

_LENGTH_JITTER = 0.1
"""Relative noise on the lengths that are sorted by.

Without it the same records of a small data set would share a batch in every epoch.
"""


@dataclass(frozen=True)
class Split:
    """How a batch of `global_size` records is run: at most `micro_size` at a time on each of `ranks`,
    `accumulation` times.
    """

    global_size: int
    micro_size: int
    accumulation: int
    ranks: int

    @classmethod
    def of(cls, global_size: int, micro_size: int, ranks: int) -> Split:
        """The fewest micro-steps that hold the batch; micro-batches no larger than needed."""
        accumulation = ceil(global_size / (ranks * micro_size))
        return cls(global_size, ceil(global_size / (ranks * accumulation)), accumulation, ranks)


@dataclass(frozen=True)
class Batches:
    """The batches of a whole training, as record numbers, in the order they are taken."""

    lengths: tuple[int, ...]
    """Tokens of each record."""
    global_size: int
    epochs: int
    seed: int

    @property
    def per_epoch(self) -> int:
        return ceil(len(self.lengths) / self.global_size)

    @property
    def num_steps(self) -> int:
        return self.epochs * self.per_epoch

    def at(self, step: int) -> list[int]:
        """The records of optimizer step `step` (from 0), shortest first.

        In every epoch the last batch of a window may be short.
        """
        epoch, index = divmod(step, self.per_epoch)
        return _epoch(self.lengths, self.global_size, self.seed, epoch)[index]


@lru_cache(maxsize=1)  # `at` asks for an epoch once a step
def _epoch(lengths: tuple[int, ...], global_size: int, seed: int, epoch: int) -> list[list[int]]:
    chance = random.Random(f"batches {seed} {epoch}")
    order = list(range(len(lengths)))
    chance.shuffle(order)
    window = _WINDOW_BATCHES * global_size
    batches = []
    for start in range(0, len(order), window):
        near = {
            i: lengths[i] * chance.uniform(1 - _LENGTH_JITTER, 1 + _LENGTH_JITTER)
            for i in order[start : start + window]
        }
        by_length = sorted(near, key=near.__getitem__)
        for i in range(0, len(by_length), global_size):
            batches.append(sorted(by_length[i : i + global_size], key=lengths.__getitem__))
    chance.shuffle(batches)
    return batches


def micro_batches(batch: Sequence[int], split: Split, rank: int) -> list[list[int]]:
    """The parts of `batch` that `rank` runs, one a micro-step; empty ones where there are too few records.

    Parts differ by one record at most. What the ranks run in the same micro-step lies side by side in
    `batch`, so they take about as long.
    """
    num_parts = split.ranks * split.accumulation
    bounds = [len(batch) * part // num_parts for part in range(num_parts + 1)]
    own = range(rank, num_parts, split.ranks)
    return [list(batch[bounds[part] : bounds[part + 1]]) for part in own]
