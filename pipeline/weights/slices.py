"""Slices of a source, read into page-aligned memory, past the page cache where that is faster."""

from __future__ import annotations

import threading

import numpy as np

from pipeline.weights.floats import Array, array_dtype
from pipeline.weights.io.direct import PAGE, InputFile, Io, page_memory, pages_up
from pipeline.weights.io.pread import PreadFile
from pipeline.weights.source import DTYPE_BYTES, TensorSource
from pipeline.weights.stored import Extent, StoredSource

_SMALL_EXTENT_BYTES = 64 << 10
"""Shorter pieces are not worth a direct transfer of whole pages."""


def room_for(num_bytes: int) -> int:
    """Bytes of memory that a slice of `num_bytes` needs: whole pages around every piece that is read
    directly.
    """
    return pages_up(num_bytes) + 2 * PAGE * (2 + num_bytes // _SMALL_EXTENT_BYTES)


class SliceReader:
    """Reads the slices of one source from several threads, each into memory of its own."""

    def __init__(self, source: TensorSource, io: Io, *, may_use_cache: bool) -> None:
        """`may_use_cache`: with `auto`, take from the page cache what lies there; else the disk's own
        bytes.
        """
        self._source = source
        self._io = io
        self._may_use_cache = may_use_cache
        self._files: dict[PreadFile, InputFile] = {}
        self._lock = threading.Lock()
        self._own = threading.local()

    def read(self, name: str, start: int, stop: int) -> Array:
        """Elements [start, stop) of a tensor, at least one, as `TensorSource.read` gives them.

        They are good until this thread's next read: both use the thread's own memory.
        """
        dtype = self._source.tensors[self._source.aliases.get(name, name)].dtype
        num_bytes = (stop - start) * DTYPE_BYTES[dtype]
        area = self._area(room_for(num_bytes))
        # Others compute their values: there is no file to read past the page cache.
        if not isinstance(self._source, StoredSource):
            return self._source.read(name, start, stop, np.frombuffer(area, array_dtype(dtype), stop - start))
        begin = self._gather(self._source.locate(name, start, stop), area, DTYPE_BYTES[dtype])
        return np.frombuffer(area, array_dtype(dtype), stop - start, begin)

    def _area(self, num_bytes: int) -> memoryview:
        """The thread's memory, kept between reads: mapping it anew for each costs as much as the reading."""
        area: memoryview | None = getattr(self._own, "area", None)
        if area is None or len(area) < num_bytes:
            area = self._own.area = page_memory(num_bytes)
        return area

    def _gather(self, extents: list[Extent], area: memoryview, element_bytes: int) -> int:
        """Bring `extents` one behind the other into `area`; returns the position of the first byte.

        A direct read fills whole pages, so its bytes begin inside a page. The first extent stays where it was
        read, and the others are moved up behind it. Elements must stay aligned: odd ones go through the
        cache.
        """
        begin = end = 0
        for extent in extents:
            file = self._file(extent.file)
            skipped = extent.offset % PAGE
            if not file.is_direct or extent.num_bytes < _SMALL_EXTENT_BYTES or skipped % element_bytes:
                file.read(area[end : end + extent.num_bytes], extent.offset)
            else:
                page = pages_up(end)
                file.read_pages(area[page:], extent.offset - skipped, skipped + extent.num_bytes)
                if end == 0:
                    begin = end = skipped
                else:
                    area[end : end + extent.num_bytes] = area[
                        page + skipped : page + skipped + extent.num_bytes
                    ]
            end += extent.num_bytes
        return begin

    def _file(self, file: PreadFile) -> InputFile:
        with self._lock:
            if file not in self._files:
                self._files[file] = InputFile(file, self._io, self._may_use_cache)
            return self._files[file]

    def close(self) -> None:
        """Close what was opened here; the source stays open."""
        for file in self._files.values():
            file.close()
