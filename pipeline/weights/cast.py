"""Cast: a source as it is to be stored, its floating-point tensors in one dtype, and nothing noted of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.weights import stream
from pipeline.weights.floats import Array, array_dtype, narrow, widen
from pipeline.weights.source import DTYPE_BYTES, TensorSource

_BLOCK_ELEMENTS = 1 << 17
"""Rounded at a time, so that what that takes besides the result stays small."""
_BLOCK_BYTES = 32
"""The most that rounding takes for an element: its float32 and what is computed on the way."""


class Cast:
    """A `WritableSource` of another source's tensors; integers and booleans keep their dtype."""

    def __init__(self, source: TensorSource, dtype: str) -> None:
        """Closing closes `source`, too."""
        self.kind = source.kind
        self.tensors = {
            name: replace(info, dtype=dtype) if info.is_floating else info
            for name, info in source.tensors.items()
        }
        self.aliases = dict(source.aliases)
        self._source = source
        # The elements of a chunk as they are read, which may be wider than the chunk, and one block's
        # rounding.
        widest = max((DTYPE_BYTES[info.dtype] for info in source.tensors.values()), default=1)
        self.thread_bytes = stream.CHUNK_BYTES * widest // DTYPE_BYTES[dtype] + _BLOCK_BYTES * _BLOCK_ELEMENTS

    def read(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        """As `TensorSource.read`; values become float32, then the nearest of the stored dtype."""
        owner = self.aliases.get(name, name)
        dtype = self.tensors[owner].dtype
        if dtype == self._source.tensors[owner].dtype:
            return self._source.read(owner, start, stop, out)
        values = self._source.read(owner, start, stop)
        out = np.empty(values.size, array_dtype(dtype)) if out is None else out
        wide = np.empty(min(values.size, _BLOCK_ELEMENTS), np.float32)
        for begin in range(0, values.size, _BLOCK_ELEMENTS):
            block = values[begin : begin + _BLOCK_ELEMENTS]
            narrow(widen(block, wide[: block.size]), out[begin : begin + _BLOCK_ELEMENTS])
        return out

    def read_noting(self, name: str, start: int, stop: int, out: Array) -> None:
        """As `read`."""
        self.read(name, start, stop, out)

    def notes(self, name: str) -> stream.Notes:
        return _Nothing()

    def is_noted(self, noted: dict[str, Any]) -> bool:
        return True

    def many_threads(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self._source.close()


class _Nothing:
    """Notes that are empty."""

    def add(self, observed: None) -> None:
        pass

    def finish(self) -> dict[str, Any]:
        return {}
