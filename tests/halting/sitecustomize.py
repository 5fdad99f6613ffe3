"""Halts a process at a chosen point. Python imports this at its start where the folder is on its path.

FLEARN_HALTS is a JSON list of points; see `tests/halts.py`, which sets it. A point is the n-th time that the
process is about to write a file of a certain name: to open it for writing, or to rename another to that
name. Of all processes the first to come there halts: until it hears a signal, or until it is let go.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from typing import Any


def watch(points: list[dict[str, Any]]) -> None:
    """Look at every file that this process is about to write."""
    points = [point for point in points if point["variables"].items() <= os.environ.items()]
    counts = [0] * len(points)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        path = written(event, arguments)
        if path is None:
            return
        for i, point in enumerate(points):
            if fnmatch(path, point["pattern"]):
                counts[i] += 1
                if counts[i] == point["number"]:
                    halt(point["folder"])

    sys.addaudithook(on_event)


def written(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The path that an audit event is about to write, if any."""
    if event == "os.rename":
        path = arguments[1]
    elif event == "open" and arguments[2] & os.O_ACCMODE:
        path = arguments[0]
    else:
        return None
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None


def halt(folder: str) -> None:
    """Say that this process is here, and wait. Audit events come before the deed: the file is unwritten."""
    with woken_by_signals() as heard:
        try:
            here = os.open(f"{folder}/here", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:  # another process was here before
            return
        os.write(here, f"{os.getpid()}\n".encode())
        os.close(here)
        go = os.open(f"{folder}/go", os.O_RDWR)  # a named pipe; opened for both, it never ends
        select.select([go, heard], [], [])
        os.close(go)


@contextmanager
def woken_by_signals() -> Iterator[int]:
    """A descriptor that can be read once a signal has come. Only the main thread hears signals."""
    heard, hears = os.pipe()
    os.set_blocking(hears, False)
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(hears) if is_main else -1
    try:
        yield heard
    finally:
        if is_main:
            signal.set_wakeup_fd(before)
        os.close(heard)
        os.close(hears)


with suppress(KeyError):
    watch(json.loads(os.environ["FLEARN_HALTS"]))
