"""A file that is read by position: from any thread, without a mapping, straight into the caller's memory."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

from pipeline.errors import InputError


class PreadFile:
    """An open file and its size in bytes. It caches nothing, so memory is what the caller holds."""

    def __init__(self, path: Path) -> None:
        """Raises InputError if `path` is not a readable file."""
        self._descriptor = -1  # so that __del__ works where opening fails
        self.path = path
        self._descriptor = _open(path)
        self.size = os.fstat(self._descriptor).st_size

    def read_bytes(self, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` bytes from `offset` on. Raises InputError where the file is shorter."""
        buffer = bytearray(num_bytes)
        self.fill(memoryview(buffer), offset)
        return bytes(buffer)

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on. Raises InputError where the file is shorter."""
        # Positions, not seeks: threads share the descriptor. No mapping: a truncated file would kill us by
        # SIGBUS.
        while view:  # network file systems may return less than was asked for
            try:
                num_read = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read at byte {offset}: {error.strerror}") from error
            if num_read == 0:
                raise InputError(
                    f"{self.path}: ends at byte {offset}, {len(view)} bytes short;"
                    " the file is truncated, get it again"
                )
            view = view[num_read:]
            offset += num_read

    def reopen(self, flags: int) -> int:
        """Another descriptor of this very file, even if its path now leads to another. Raises OSError."""
        try:
            return os.open(f"/proc/self/fd/{self._descriptor}", flags | os.O_CLOEXEC)
        except OSError as error:
            error.filename = str(self.path)  # not its number in this process
            if error.errno != errno.EMFILE or not _lift_limit():
                raise
        return self.reopen(flags)

    def close(self) -> None:
        """Let go of the file; again does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EMFILE or not _lift_limit():
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return _open(path)


def _lift_limit() -> bool:
    """Allow as many open files as the system lets us; False if that was so already.

    A checkpoint of 1000 ranks has 2000 files, the usual limit is 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True
