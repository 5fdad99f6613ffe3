"""Points at which a test halts other processes, to disturb them there and not wherever they happen to be."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

HALTING = Path(__file__).with_name("halting")
MOST_SECONDS = 600
"""Only a process that never comes takes so long."""

Found = TypeVar("Found")


class Halt:
    """The `number`-th time that a process writes a file whose path matches `pattern`, just before it does.

    The first process to come there halts until a signal arrives that it handles, or until it is let go.
    """

    def __init__(self, folder: Path, pattern: str, number: int = 1, **variables: str) -> None:
        """`folder` is a new one of the halt's own. Only processes with these environment `variables` halt."""
        folder.mkdir(parents=True)
        os.mkfifo(folder / "go")
        self.pattern = pattern
        self.number = number
        self.variables = variables
        self._folder = folder

    @property
    def settings(self) -> dict[str, object]:
        """What `halting/sitecustomize.py` wants to know."""
        return {
            "folder": str(self._folder),
            "pattern": self.pattern,
            "number": self.number,
            "variables": self.variables,
        }

    def wait(self, is_alive: Callable[[], bool] = lambda: True) -> int:
        """Until a process halts there: its id. `is_alive` says whether one may still come."""
        return int(wait_until(self._read, f"a halt at {self.pattern}", is_alive))

    def _read(self) -> str:
        here = self._folder / "here"
        line = here.read_text() if here.exists() else ""
        return line if line.endswith("\n") else ""

    def let_go(self) -> None:
        """Let the halted process go on."""
        go = os.open(self._folder / "go", os.O_WRONLY)  # the halted process has it open
        os.write(go, b"!")
        os.close(go)


def environment(*halts: Halt) -> dict[str, str]:
    """What processes that are to halt have in their environment."""
    paths = [str(HALTING), *filter(None, [os.environ.get("PYTHONPATH")])]
    points = json.dumps([halt.settings for halt in halts])
    return {"PYTHONPATH": os.pathsep.join(paths), "FLEARN_HALTS": points}


def wait_until(
    condition: Callable[[], Found], what: str, is_alive: Callable[[], bool] = lambda: True
) -> Found:
    """Until `condition` holds; what it found. No test counts on how long that takes."""
    deadline = time.monotonic() + MOST_SECONDS
    while not (found := condition()):
        assert is_alive(), f"ended before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found
