"""Tensors that lie in files, contiguous or in pieces over many: the part that every source on a disk shares.

A ZeRO partition, a group over its ranks, a parameter inside it: each is a slice or a join of others, so the
layouts of checkpoints are written as an algebra of `StoredTensor`s, and reading is written once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import InputError
from pipeline.weights.io.pread import PreadFile
from pipeline.weights.source import DTYPE_BYTES, TensorInfo

if TYPE_CHECKING:
    from pipeline.weights.floats import Array


class Piece(NamedTuple):
    """Consecutive elements in one file, from byte `offset` on."""

    file: PreadFile
    offset: int
    num_elements: int


class Extent(NamedTuple):
    """Consecutive bytes of an open file."""

    file: PreadFile
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A flat tensor of one dtype that lies in files, piece after piece."""

    dtype: str
    pieces: tuple[Piece, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(piece.num_elements for piece in self.pieces))

    @property
    def num_elements(self) -> int:
        return self._ends[-1] if self.pieces else 0

    def slice(self, start: int, stop: int) -> StoredTensor:
        """Elements [start, stop)."""
        return StoredTensor(self.dtype, tuple(self._cut(start, stop)))

    def _cut(self, start: int, stop: int) -> Iterator[Piece]:
        assert 0 <= start <= stop <= self.num_elements, (start, stop, self.num_elements)
        size = DTYPE_BYTES[self.dtype]
        # A group of 1000 ranks has 1000 pieces: no search from the front.
        index = bisect_right(self._ends, start)
        while start < stop:
            file, offset, num_elements = self.pieces[index]
            skipped = start - (self._ends[index] - num_elements)
            taken = min(num_elements - skipped, stop - start)
            if taken:
                yield Piece(file, offset + skipped * size, taken)
            start += taken
            index += 1

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Elements [start, stop) in `out`, or in a new 1-D array."""
        # Not with the module: planning an experiment opens files, and must not wait for numpy.
        import numpy as np

        from pipeline.weights.floats import array_dtype

        values = np.empty(stop - start, array_dtype(self.dtype)) if out is None else out
        view, done = values.view(np.uint8).data, 0
        for extent in self.locate(start, stop):
            extent.file.fill(view[done : done + extent.num_bytes], extent.offset)
            done += extent.num_bytes
        return values

    def locate(self, start: int, stop: int) -> list[Extent]:
        """Where the bytes of elements [start, stop) lie, in order."""
        size = DTYPE_BYTES[self.dtype]
        return [
            Extent(piece.file, piece.offset, piece.num_elements * size) for piece in self._cut(start, stop)
        ]


def join(tensors: Iterable[StoredTensor]) -> StoredTensor:
    """One after another as one flat tensor. Raises InputError unless all have the same dtype."""
    parts = list(tensors)
    for part in parts:
        if part.dtype != parts[0].dtype:
            where = next(piece.file.path for piece in part.pieces)
            raise InputError(
                f"{where}: holds {part.dtype} where files beside it hold {parts[0].dtype};"
                " files of different saves are mixed"
            )
    return StoredTensor(parts[0].dtype, tuple(piece for part in parts for piece in part.pieces))


class StoredSource:
    """A tensor source over stored tensors (see `TensorSource`)."""

    kind: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._stored: dict[str, StoredTensor] = {}
        self._files: list[PreadFile] = []

    def add(self, name: str, shape: tuple[int, ...], stored: StoredTensor) -> None:
        """Enter a tensor.

        Raises InputError if its shape and what is stored differ in size, or its name cannot be printed.
        """
        self._require_printable(name)
        info = TensorInfo(name, shape, stored.dtype)
        if stored.num_elements != info.num_elements:
            raise InputError(
                f"{self.path}: {name!r} of shape {shape} has {stored.num_elements} elements;"
                " the files are damaged or mixed"
            )
        self.tensors[name] = info
        self._stored[name] = stored

    def tie(self, alias: str, owner: str) -> None:
        """Enter another name of the tensor `owner`. Raises InputError if it cannot be printed."""
        self._require_printable(alias)
        self.aliases[alias] = owner

    def _require_printable(self, name: object) -> None:
        """A name goes into headers, messages and terminals: no control characters, no surrogates."""
        if not isinstance(name, str) or not name.isprintable():
            raise InputError(
                f"{self.path}: a tensor is named {name!r}, which is not printable text;"
                " the file is damaged or hostile"
            )

    def read(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        """As `TensorSource.read`, through the page cache (`slices.SliceReader` goes past it)."""
        return self._stored[self.aliases.get(name, name)].read(start, stop, out)

    def locate(self, name: str, start: int, stop: int) -> list[Extent]:
        """The files and byte ranges that hold elements [start, stop) of the flattened tensor, in order."""
        return self._stored[self.aliases.get(name, name)].locate(start, stop)

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors and aliases by the names that `names` has for them; others keep theirs.

        It must be one to one.
        """
        renamed = {names.get(name, name): name for name in [*self.tensors, *self.aliases]}
        assert len(renamed) == len(self.tensors) + len(self.aliases), names
        self.tensors = {
            names.get(name, name): replace(info, name=names.get(name, name))
            for name, info in self.tensors.items()
        }
        self._stored = {names.get(name, name): stored for name, stored in self._stored.items()}
        self.aliases = {
            names.get(alias, alias): names.get(owner, owner) for alias, owner in self.aliases.items()
        }

    def close(self) -> None:
        for file in self._files:
            file.close()
