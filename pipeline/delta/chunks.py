"""A shard's file cut into chunks of fixed size: the unit of reading, arithmetic and writing.

The grid is the same whatever the memory and the number of threads, so the sums of survival are, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.weights.shard import Shard
from pipeline.weights.source import DTYPE_BYTES, TensorInfo

CHUNK_BYTES = 4 << 20


class Part(NamedTuple):
    """Elements [start, stop) of a tensor, which lie at byte `position` of their chunk."""

    tensor: TensorInfo
    start: int
    stop: int
    position: int

    @property
    def end(self) -> int:
        return self.position + (self.stop - self.start) * DTYPE_BYTES[self.tensor.dtype]


class Chunk(NamedTuple):
    """Bytes [offset, offset + num_bytes) of a shard's file: perhaps some of its header, then parts of
    tensors.
    """

    number: int
    offset: int
    num_bytes: int
    is_last: bool
    header: bytes
    parts: list[Part]


def cut(shard: Shard) -> Iterator[Chunk]:
    """The chunks of a shard's file, in order.

    No element lies across two chunks: tensors begin at multiples of their element's size, and so does every
    chunk.
    """
    header, num_bytes = shard.header, shard.num_bytes
    places = _places(shard, len(header))
    parts = next(places, None)
    for number, offset in enumerate(range(0, num_bytes, CHUNK_BYTES)):
        end = min(offset + CHUNK_BYTES, num_bytes)
        found = []
        while parts is not None and parts[1] < end:
            tensor, begin = parts
            size = DTYPE_BYTES[tensor.dtype]
            start, stop = max(0, offset - begin) // size, min(end - begin, tensor.num_bytes) // size
            found.append(Part(tensor, start, stop, begin + start * size - offset))
            if begin + tensor.num_bytes > end:
                break
            parts = next(places, None)
        yield Chunk(number, offset, end - offset, end == num_bytes, header[offset:end], found)


def _places(shard: Shard, offset: int) -> Iterator[tuple[TensorInfo, int]]:
    """The tensors that hold anything, each with the byte of the file where it begins."""
    for tensor in shard.tensors:
        if tensor.num_bytes:
            yield tensor, offset
        offset += tensor.num_bytes
