"""Which parts of a file lie in the page cache: what a fine-tuning has just written need not come from the
disk again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_LIBC = ctypes.CDLL(None)


def tells_its_pages(path: Path, descriptor: int) -> bool:
    """Whether the kernel says which pages of this open file are there.

    Of somebody else's file that we cannot write, Linux says since 5.2 that all are.
    """
    return os.fstat(descriptor).st_uid == os.geteuid() or os.access(path, os.W_OK, effective_ids=True)


def is_cached(descriptor: int, offset: int, num_bytes: int) -> bool:
    """Whether all of `num_bytes` bytes from `offset` on can be had without the disk. Reads nothing.

    A read that asks not to wait (RWF_NOWAIT) would tell as much, but where the bytes are missing it sets off
    a read-ahead.
    """
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
