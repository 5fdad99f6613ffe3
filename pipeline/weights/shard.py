"""Shards: which tensors go into which safetensors file, and where in it each of their bytes lies.

A file that does not exist yet is known to the byte. So any worker can write any part of it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError
from pipeline.weights.formats.safetensors import SINGLE, TAG_OF_DTYPE
from pipeline.weights.source import DTYPE_BYTES, TensorInfo

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}


def parse_size(text: str | int) -> int:
    """Bytes of a size like `2GB` (10**9), `256MiB` (2**20) or a plain number.

    Raises InputError for anything else, and for 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise InputError(f"{text!r} is not a size; write for example 2GB, 500MB or 256MiB")
    return size


class Part(NamedTuple):
    """Elements [start, stop) of a tensor, which begin `position` bytes after the range that was asked for."""

    tensor: TensorInfo
    start: int
    stop: int
    position: int
    """Below 0 where the range begins inside an element."""

    @property
    def end(self) -> int:
        """Where its bytes end, counted like `position`."""
        return self.position + (self.stop - self.start) * DTYPE_BYTES[self.tensor.dtype]


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be: its name and its tensors in the order of their bytes."""

    file_name: str
    tensors: tuple[TensorInfo, ...]

    @cached_property
    def header(self) -> bytes:
        """All that comes before the tensors' bytes."""
        return header_bytes(self.tensors)

    @cached_property
    def _begins(self) -> list[int]:
        """The byte of the file at which each tensor begins, and in the end the size of the file."""
        sizes = (info.num_bytes for info in self.tensors)
        return list(accumulate(sizes, initial=len(self.header)))

    @property
    def num_bytes(self) -> int:
        """The size of the whole file."""
        return self._begins[-1]

    def locate(self, first_byte: int, last_byte: int) -> list[Part]:
        """The elements that have any of the file's bytes from `first_byte` up to, not including, `last_byte`.

        In their order. Bytes before `len(header)` belong to none.
        """
        assert first_byte < last_byte, (first_byte, last_byte)
        parts = []
        for i in range(max(0, bisect_right(self._begins, first_byte) - 1), len(self.tensors)):
            tensor, begin = self.tensors[i], self._begins[i]
            if begin >= last_byte:  # tensors lie in order
                break
            size = DTYPE_BYTES[tensor.dtype]
            start = max(0, first_byte - begin) // size
            stop = -(-min(last_byte - begin, tensor.num_bytes) // size)
            if start < stop:  # not so for an empty tensor
                parts.append(Part(tensor, start, stop, begin + start * size - first_byte))
        return parts

    def is_written(self, folder: Path) -> bool:
        """Whether `folder` has this very file: right size, right header.

        That is enough, for a shard is renamed into place only when it is whole.
        """
        path = folder / self.file_name
        if not path.is_file() or path.stat().st_size != self.num_bytes:
            return False
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header


def plan_shards(tensors: Iterable[TensorInfo], max_shard_bytes: int) -> list[Shard]:
    """Fill shards in the given order, up to `max_shard_bytes` of tensors each.

    A larger tensor has a shard of its own.

    Names are the Hugging Face hub's: `model.safetensors`, or `model-00001-of-00003.safetensors`.
    """
    groups: list[list[TensorInfo]] = [[]]
    room = max_shard_bytes
    for info in tensors:
        if groups[-1] and info.num_bytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(info)
        room -= info.num_bytes
    names = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    )
    return [Shard(name, aligned(group)) for name, group in zip(names, groups, strict=True)]


def aligned(tensors: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    """The tensors with wider dtypes first: so each begins at a multiple of its element's size."""
    # Python's sort is stable: among tensors of one width the given order stays.
    return tuple(sorted(tensors, key=lambda info: -DTYPE_BYTES[info.dtype]))


def header_bytes(tensors: Sequence[TensorInfo]) -> bytes:
    """The header of a safetensors file that holds `tensors` in this order, padded to a multiple of 8
    bytes.
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for info in tensors:
        end = begin + info.num_bytes
        content[info.name] = {
            "dtype": TAG_OF_DTYPE[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    # The first tensor begins at a multiple of 8 bytes, as in the safetensors package.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    weight_map = {info.name: shard.file_name for shard in shards for info in shard.tensors}
    total_size = sum(info.num_bytes for shard in shards for info in shard.tensors)
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
