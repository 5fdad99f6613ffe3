"""Safetensors files being written: which tensors go into which shard, and one shard written slice by
slice.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.weights.aside import AsideFile
from pipeline.weights.safetensors import SINGLE, TAG_OF_DTYPE
from pipeline.weights.source import DTYPE_BYTES, TensorInfo

if TYPE_CHECKING:
    import torch

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
    """Bytes of a size like `2GB` (10**9), `256MiB` (2**20) or a plain number. Raises InputError for anything
    else and for 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise InputError(f"{text!r} is not a size; write for example 2GB, 500MB or 256MiB")
    return size


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be: its name and its tensors in the order of their bytes."""

    file_name: str
    tensors: tuple[TensorInfo, ...]

    @property
    def header(self) -> bytes:
        return header_bytes(self.tensors)

    @property
    def num_bytes(self) -> int:
        """The size of the whole file."""
        return len(self.header) + sum(info.num_bytes for info in self.tensors)

    def is_written(self, folder: Path) -> bool:
        """Whether `folder` has this very file: right size, right header. (A shard is renamed into place only
        when whole.)
        """
        path = folder / self.file_name
        if not path.is_file() or path.stat().st_size != self.num_bytes:
            return False
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header


def plan_shards(tensors: Iterable[TensorInfo], max_shard_bytes: int) -> list[Shard]:
    """Fill shards in the given order, up to `max_shard_bytes` of tensors each; a larger tensor has a shard of
    its own.

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
    """The tensors with wider dtypes first, else in the given order: so that each begins at a multiple of its
    element's size.
    """
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
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    weight_map = {info.name: shard.file_name for shard in shards for info in shard.tensors}
    total_size = sum(info.num_bytes for shard in shards for info in shard.tensors)
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


class ShardWriter(AsideFile):
    """One safetensors file in the making, for any threads to write slices into. Used as a context manager
    (see `AsideFile`).
    """

    def __init__(self, path: Path, tensors: Iterable[TensorInfo]) -> None:
        """Raises OSError (ENOSPC, with the file's name) if the disk is too full."""
        self.tensors = aligned(tensors)
        self._infos = {info.name: info for info in self.tensors}
        self._offsets: dict[str, int] = {}
        header = header_bytes(self.tensors)
        offset = len(header)
        for info in self.tensors:
            self._offsets[info.name] = offset
            offset += info.num_bytes
        self._missing_bytes = offset - len(header)
        self._lock = threading.Lock()
        super().__init__(path, offset)
        self.write(memoryview(header), 0)

    def write_slice(self, name: str, start: int, values: torch.Tensor) -> None:
        """Put `values` (1-D, the tensor's dtype) at elements [start, start + len) of the flattened tensor
        `name`. Each element once.
        """
        import torch

        info = self._infos[name]
        assert (
            values.dtype == getattr(torch, info.dtype)
            and start >= 0
            and start + values.numel() <= info.num_elements
        ), name
        view = values.contiguous().view(torch.uint8).numpy().data
        self.write(view, self._offsets[name] + start * DTYPE_BYTES[info.dtype])
        with self._lock:
            self._missing_bytes -= len(view)

    def commit(self) -> None:
        """Sync the file and rename it into place. Every element must have been written."""
        assert self._missing_bytes == 0, f"{self.path}: {self._missing_bytes} bytes were never written"
        super().commit()
