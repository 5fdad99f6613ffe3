"""Presence: a lock that shows which workers live, by which what dead ones began is told from what living ones are at.

All who work on the same thing share it; whoever wants to clear that away must have it alone. The system releases it when
a process ends, in whatever way. On a file system without locks everybody works, and nobody clears away.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

LOCK = "lock"


class Presence:
    """One worker's hold on the file `lock` of a folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor = -1

    def enter(self) -> None:
        """Be here until `close`. Waits while another worker clears away. Raises FileNotFoundError if the folder is gone."""
        while True:
            self._open(os.O_RDONLY)
            with suppress(OSError):  # no locks
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            if self._is_the_folders():
                return

    def is_alone(self) -> bool:
        """Whether no other worker is here; then none can enter before `close`. False also where that cannot be told."""
        try:
            self._open(os.O_RDWR)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return self._is_the_folders()

    def close(self) -> None:
        """Safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self, access: int) -> None:
        self.close()
        self._descriptor = os.open(self._path, access | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _is_the_folders(self) -> bool:
        """Whether the file that was opened is still there: another worker may have removed the folder before it was locked."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except OSError:
            return False
