"""A file written aside and renamed into place when it is whole, with a lock that tells living writers from
killed ones.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pipeline.artifact import sync

Self = TypeVar("Self", bound="AsideFile")


class AsideFile:
    """A file in the making, of known size, for any threads to write into. Used as a context manager.

    It is made at its full size, so that a full disk is met before the work, not after it. Leaving the context
    syncs it and renames it into place; leaving by an exception removes it. It is locked while it is written,
    by which `sweep` tells a killed writer's leftover from a living one's work.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Raises OSError (ENOSPC) if the disk is too full; this and all later ones have the file's name."""
        self.path = path
        self.num_bytes = num_bytes
        self.descriptor, self.temporary = _create(path)
        try:
            with named(path):
                os.posix_fallocate(self.descriptor, 0, num_bytes)
        except BaseException:
            self.abandon()
            raise

    def write(self, view: memoryview, offset: int) -> None:
        """Put the bytes of `view` at `offset`."""
        with named(self.path):
            while view:
                num_written = os.pwrite(self.descriptor, view, offset)
                view = view[num_written:]
                offset += num_written

    def commit(self) -> None:
        """Sync the file and rename it into place, replacing one of that name."""
        with named(self.path):
            os.fsync(self.descriptor)
            os.fchmod(self.descriptor, 0o644)
            os.replace(self.temporary, self.path)
        self._close()
        sync(self.path.parent)

    def abandon(self) -> None:
        """Remove what was written."""
        self.temporary.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self: Self) -> Self:
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
def named(path: Path) -> Iterator[None]:
    """What the system says of a descriptor names no file; who reads it wants to know which."""
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
    """Remove what killed writers left in `folder`; files that a living one still writes stay (and all, where
    there are no locks).
    """
    for path in folder.glob(".*.safetensors.????????.tmp"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # renamed or swept meanwhile
            continue
        if _lock(descriptor):
            path.unlink(missing_ok=True)
        os.close(descriptor)
