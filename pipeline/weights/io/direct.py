"""Direct I/O: reading and writing past the page cache (O_DIRECT), half the work for bytes that are met once.

Direct transfers want offsets, lengths and memory in whole pages. Where a file system refuses them, or the
page cache already holds the bytes, the page cache is used.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pipeline.errors import InputError
from pipeline.weights.io.pread import PreadFile

Io = Literal["auto", "direct", "buffered"]

PAGE = 4096
_LARGE_FILE_BYTES = 64 << 20
"""With `auto`, smaller files go through the page cache: the next stage will read them from there."""

_LIBC = ctypes.CDLL(None)


def page_memory(num_bytes: int) -> memoryview:
    """Private memory that begins at a page; it is given back when nothing views it any more."""
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def pages_up(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE


class InputFile:
    """A file that is read past the page cache where that is wanted and possible; safe from several
    threads.
    """

    def __init__(self, file: PreadFile, io: Io, may_use_cache: bool) -> None:
        """Opens a second descriptor of the file that `file` has open, whatever its path now leads to.

        Args:
            io: `direct` and `buffered` always read so; `auto` reads large files directly.
            may_use_cache: With `auto`, take from the page cache what lies there.
        """
        # Both are needed: what is not whole pages, and what O_DIRECT refuses, is read through the page cache.
        self._buffered = file
        self._direct = open_direct(file.path, file.reopen, os.O_RDONLY, io, file.size)
        self._asks_cache = (
            may_use_cache
            and io == "auto"
            and self._direct is not None
            and tells_its_pages(file.path, self._direct)
        )

    @property
    def is_direct(self) -> bool:
        return self._direct is not None

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` on, through the page cache. Raises InputError where the file is
        shorter.
        """
        self._buffered.fill(view, offset)

    def read_pages(self, view: memoryview, offset: int, num_bytes: int) -> None:
        """Read `num_bytes` from `offset` on, and up to a page more. `offset` and `view` begin at a page."""
        assert self._direct is not None and offset % PAGE == 0
        if self._asks_cache and is_cached(self._direct, offset, num_bytes):
            self.read(view[:num_bytes], offset)
            return
        done = 0
        # A short read that ends inside a page cannot go on directly.
        while done < num_bytes and done % PAGE == 0:
            num_read = _read_direct(self._direct, view[done : pages_up(num_bytes)], offset + done)
            if num_read == 0:  # refused, or the end of the file
                break
            done += num_read
        if done < num_bytes:
            self.read(view[done:num_bytes], offset + done)

    def close(self) -> None:
        """Close the descriptor that was opened here; `file` stays open."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def open_direct(path: Path, reopen: Callable[[int], int], flags: int, io: Io, num_bytes: int) -> int | None:
    """A descriptor for direct I/O on a file of `num_bytes`; None where it is not wanted or not possible.

    `reopen(flags)` opens the file; `path` is its name for messages.
    Raises InputError where the file system refuses what `direct` demands.
    """
    is_wanted = io == "direct" or (io == "auto" and num_bytes >= _LARGE_FILE_BYTES)
    if not is_wanted or not hasattr(os, "O_DIRECT"):
        return None
    try:
        return reopen(flags | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL and io == "direct":
            advice = "this file system does not take direct I/O; use --io buffered"
            raise InputError(f"{path.parent}: {advice}") from error
        # ENOENT: there is no /proc here. EMFILE: so many files that a second descriptor is one too many.
        if error.errno in (errno.EINVAL, errno.ENOENT, errno.EMFILE) and io == "auto":
            return None
        raise


def _read_direct(descriptor: int, view: memoryview, offset: int) -> int:
    try:
        return os.preadv(descriptor, [view], offset)
    except OSError:  # the caller reads through the page cache instead, and meets a real error there
        return 0


def write_direct(descriptor: int, view: memoryview, offset: int) -> int:
    """Write whole pages; the bytes written are fewer where the file system balks. Raises OSError (ENOSPC)."""
    done = 0
    while done < len(view) and done % PAGE == 0:
        try:
            done += os.pwrite(descriptor, view[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return done
    return done


def tells_its_pages(path: Path, descriptor: int) -> bool:
    """Whether the kernel says which pages of this open file are cached.

    Of somebody else's file that we cannot write, Linux says since 5.2 that all are.
    """
    return os.fstat(descriptor).st_uid == os.geteuid() or os.access(path, os.W_OK, effective_ids=True)


def is_cached(descriptor: int, offset: int, num_bytes: int) -> bool:
    """Whether the page cache holds all of `num_bytes` bytes from `offset` on. Reads nothing.

    RWF_NOWAIT would tell as much, but where bytes are missing it sets off a read-ahead: hence mincore.
    """
    # Not with the module: planning imports it by way of the journal, and must not wait for numpy.
    import numpy as np

    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        mapping = mmap.mmap(descriptor, offset + num_bytes - begin, access=mmap.ACCESS_READ, offset=begin)
    except (OSError, ValueError):  # no mappings here, or the file is shorter: let the read itself say so
        return False
    with mapping:
        is_there = np.zeros(-(-len(mapping) // mmap.PAGESIZE), np.uint8)
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        failed = _LIBC.mincore(
            ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), ctypes.c_void_p(is_there.ctypes.data)
        )
    return not failed and bool((is_there & 1).all())
