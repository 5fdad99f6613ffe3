"""A staged file: written aside at its full size, then synced and renamed into place.

A lock on it tells the work of a living writer from what a killed one left.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from pipeline.artifact import sync
from pipeline.weights.io.direct import Io, open_direct, pages_up, write_direct


class StagedFile:
    """A file in the making, of known size, that any threads write into. Used as a context manager.

    Leaving the context syncs it and renames it into place; leaving by an exception removes it.
    """

    def __init__(self, path: Path, num_bytes: int, io: Io) -> None:
        """Allocates all of it, so that a full disk is met before the work, not after it.

        Raises OSError (ENOSPC) if the disk is too full. Every OSError of this class names `path`.
        """
        self.path = path
        self.num_bytes = num_bytes
        self._direct: int | None = None
        self._descriptor, self.temporary = _create(path)
        try:
            with _named(path):
                # ftruncate would make a file with holes, which a full disk refuses only when they are filled.
                os.posix_fallocate(self._descriptor, 0, num_bytes)
            self._direct = open_direct(
                self.temporary, lambda flags: os.open(self.temporary, flags), os.O_WRONLY, io, num_bytes
            )
        except BaseException:
            self.abandon()
            raise

    def write_pages(self, view: memoryview, num_bytes: int, offset: int) -> None:
        """Write the first `num_bytes` of `view` at `offset`. Both begin at a page, and `view` holds whole
        pages.
        """
        done = 0
        with _named(self.path):
            if self._direct is not None:
                done = min(write_direct(self._direct, view[: pages_up(num_bytes)], offset), num_bytes)
            rest = view[done:num_bytes]
            while rest:
                num_written = os.pwrite(self._descriptor, rest, offset + done)
                rest = rest[num_written:]
                done += num_written

    def commit(self) -> None:
        """Sync the file and rename it into place, replacing one of that name."""
        with _named(self.path):
            os.ftruncate(self._descriptor, self.num_bytes)  # direct I/O wrote the last page whole
            os.fsync(self._descriptor)
            os.fchmod(self._descriptor, 0o644)  # mkstemp made it for its owner alone
            os.replace(self.temporary, self.path)
        self._close()
        sync(self.path.parent)  # the rename is on the disk, too: a receipt may follow

    def abandon(self) -> None:
        """Remove what was written."""
        self.temporary.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        """Closing gives up the lock, too: only after the file has its name, or is gone."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abandon()
            return
        try:
            self.commit()
        except BaseException:
            self.temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """OSErrors from descriptor calls carry no file name: add it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _create(path: Path) -> tuple[int, Path]:
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        if _lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # another process swept it away before it was locked


def _lock(descriptor: int) -> bool | None:
    """True: locked now; False: somebody else holds it; None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`. What a living one still writes stays.

    Where the file system has no locks, everything stays.
    """
    for path in folder.glob(".*.safetensors.????????.tmp"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # renamed or swept meanwhile
            continue
        if _lock(descriptor):  # its writer has died: the lock went with it
            path.unlink(missing_ok=True)
        os.close(descriptor)
