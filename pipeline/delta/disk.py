"""Reading and writing past the page cache (O_DIRECT), into memory that is ours: half the work for bytes that
are met once.

Direct transfers want offsets, lengths and memory in whole pages. A file system that refuses them is read and
written through the page cache instead, and so, with `auto`, may be read what lies in the cache already.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.delta.floats import Array, array_dtype, of_tensor
from pipeline.delta.page_cache import is_cached, tells_its_pages
from pipeline.errors import InputError
from pipeline.weights.aside import AsideFile, named
from pipeline.weights.pread import PreadFile
from pipeline.weights.source import DTYPE_BYTES, TensorSource
from pipeline.weights.stored import Extent, StoredSource

Io = Literal["auto", "direct", "buffered"]

PAGE = 4096
_LARGE_FILE_BYTES = 64 << 20
"""`auto` takes smaller files through the page cache: they are often still there, and the next stage reads
them again.
"""
_SMALL_EXTENT_BYTES = 64 << 10
"""Shorter pieces are not worth a direct transfer of whole pages."""


def page_memory(num_bytes: int) -> memoryview:
    """Private memory that begins at a page, and is given back when nothing views it any more."""
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def room_for(num_bytes: int) -> int:
    """The memory that `SliceReader.read` needs for a slice of `num_bytes`: whole pages around every piece
    that is read directly.
    """
    return _pages_up(num_bytes) + 2 * PAGE * (2 + num_bytes // _SMALL_EXTENT_BYTES)


def _pages_up(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


class SliceReader:
    """Reads a source's slices into memory that the caller brings; from several threads at once."""

    def __init__(self, source: TensorSource, io: Io, *, may_use_cache: bool) -> None:
        """`may_use_cache`: with `auto`, what lies in the page cache is taken from there. False: the disk's
        own bytes are wanted.
        """
        self._source = source
        self._io = io
        self._may_use_cache = may_use_cache
        self._files: dict[Path, InputFile] = {}
        self._lock = threading.Lock()

    def read(self, name: str, start: int, stop: int, area: memoryview) -> Array:
        """Elements [start, stop) of a tensor, at least one, 1-D, in its stored dtype, somewhere in `area` (of
        `room_for` their bytes).

        A source that is more than bytes in files (an adapter on its base) brings memory of its own.
        """
        if not isinstance(self._source, StoredSource):
            return of_tensor(self._source.read(name, start, stop))
        dtype = self._source.tensors[name].dtype
        begin = self._gather(self._source.locate(name, start, stop), area, DTYPE_BYTES[dtype])
        return np.frombuffer(area, array_dtype(dtype), stop - start, begin)

    def _gather(self, extents: list[Extent], area: memoryview, element_bytes: int) -> int:
        """Bring `extents` one behind the other into `area`; the position of the first byte."""
        begin = end = 0
        for extent in extents:
            file = self._file(extent.path)
            skipped = extent.offset % PAGE
            if not file.is_direct or extent.num_bytes < _SMALL_EXTENT_BYTES or skipped % element_bytes:
                file.read(area[end : end + extent.num_bytes], extent.offset)
            else:
                page = _pages_up(end)
                file.read_pages(area[page:], extent.offset - skipped, skipped + extent.num_bytes)
                if end == 0:
                    begin = end = skipped
                else:
                    area[end : end + extent.num_bytes] = area[
                        page + skipped : page + skipped + extent.num_bytes
                    ]
            end += extent.num_bytes
        return begin

    def _file(self, path: Path) -> InputFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = InputFile(path, self._io, self._may_use_cache)
            return self._files[path]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class InputFile:
    """A file opened for reading, past the page cache where that is wanted and can be had."""

    def __init__(self, path: Path, io: Io, may_use_cache: bool) -> None:
        self._buffered = PreadFile(path)
        self._direct = _open_direct(path, os.O_RDONLY, io, self._buffered.size)
        self._asks_cache = (
            may_use_cache
            and io == "auto"
            and self._direct is not None
            and tells_its_pages(path, self._direct)
        )

    @property
    def is_direct(self) -> bool:
        return self._direct is not None

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` on. Raises InputError where the file is shorter."""
        self._buffered.fill(view, offset)

    def read_pages(self, view: memoryview, offset: int, num_bytes: int) -> None:
        """Read `num_bytes` from `offset` on, and up to a page more. `offset` and `view` begin at a page."""
        assert self._direct is not None and offset % PAGE == 0
        if self._asks_cache and is_cached(self._direct, offset, num_bytes):
            self.read(view[:num_bytes], offset)
            return
        done = 0
        while done < num_bytes and done % PAGE == 0:
            num_read = _read_direct(self._direct, view[done : _pages_up(num_bytes)], offset + done)
            if num_read == 0:  # refused, or the end of the file
                break
            done += num_read
        if done < num_bytes:
            self.read(view[done:num_bytes], offset + done)

    def close(self) -> None:
        self._buffered.close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


class OutputFile(AsideFile):
    """A file in the making that is written past the page cache where that is wanted and can be had."""

    def __init__(self, path: Path, num_bytes: int, io: Io) -> None:
        """Raises OSError (ENOSPC, with the file's name) if the disk is too full."""
        self._direct = None
        super().__init__(path, num_bytes)
        try:
            self._direct = _open_direct(self.temporary, os.O_WRONLY, io, num_bytes)
        except BaseException:
            self.abandon()
            raise

    def write_pages(self, view: memoryview, num_bytes: int, offset: int) -> None:
        """Write the first `num_bytes` of `view` at `offset`. Both begin at a page, and `view` holds whole
        pages.
        """
        done = 0
        if self._direct is not None:
            with named(self.path):
                done = min(_write_direct(self._direct, view[: _pages_up(num_bytes)], offset), num_bytes)
        self.write(view[done:num_bytes], offset + done)

    def commit(self) -> None:
        with named(self.path):
            os.ftruncate(self.descriptor, self.num_bytes)  # the last page was written whole
        super().commit()

    def _close(self) -> None:
        super()._close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def _open_direct(path: Path, flags: int, io: Io, num_bytes: int) -> int | None:
    if io == "buffered" or (io == "auto" and num_bytes < _LARGE_FILE_BYTES) or not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL and io == "direct":
            raise InputError(
                f"{path.parent}: this file system does not take direct I/O; use --io buffered"
            ) from error
        if error.errno == errno.EINVAL:
            return None
        raise


def _read_direct(descriptor: int, view: memoryview, offset: int) -> int:
    try:
        return os.preadv(descriptor, [view], offset)
    except OSError:  # the caller reads through the page cache instead, and meets a real error there
        return 0


def _write_direct(descriptor: int, view: memoryview, offset: int) -> int:
    """The bytes written: all of `view`, or fewer whole pages where the file system balks."""
    done = 0
    while done < len(view) and done % PAGE == 0:
        try:
            done += os.pwrite(descriptor, view[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return done
    return done
