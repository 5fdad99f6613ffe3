"""Kills `subtract` at a chosen moment, as often as asked. Each trial is a fork, so that Python starts but
once.

    python kill_subtract.py '{"base": ..., "tuned": ..., "part": [0, 1]}' OUT CALL WHEN [OUT CALL WHEN ...]

CALL is a number among the system calls that change a file (0: the trial lives), or among those of a name, as
in `pwrite:3`. The trial dies by SIGKILL before, after, or within that call: within a pwrite, or the fsync of
a file, when half of the bytes are written. Or late: before it, once other threads have made twelve more
calls. It prints a JSON line for each: how it ended, and the calls it made."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.delta.subtract import subtract
from pipeline.weights import stream

CHANGING = (
    "replace",
    "rename",
    "fsync",
    "unlink",
    "rmdir",
    "mkdir",
    "pwrite",
    "write",
    "posix_fallocate",
    "ftruncate",
)

stream.CHUNK_BYTES = 1 << 16

AHEAD = 12
"""Calls by which other threads are ahead of a thread that is killed late: they are at work on later
shards."""

_truncate = os.ftruncate


class Killer:
    """Counts the calls of `os`'s functions that change files, over all threads."""

    def __init__(self, at: str, when: str) -> None:
        self._name, _, number = at.rpartition(":")
        self._number, self._when = int(number), when
        self.calls: list[str] = []
        self._called = threading.Condition()

    def arm(self) -> None:
        for name in CHANGING:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            with self._called:
                self.calls.append(name)
                self._called.notify_all()
                same = [call for call in self.calls if self._name in ("", call)]
                is_last = len(same) == self._number and self._name in ("", name)
            if is_last and self._when in ("before", "late"):
                if self._when == "late":
                    self._wait_for(len(self.calls) + AHEAD)
                os.kill(os.getpid(), signal.SIGKILL)
            if is_last and self._when == "within" and name == "pwrite":
                descriptor, data, offset = arguments
                arguments = (descriptor, data[: len(data) // 2], offset)
            if is_last and self._when == "within" and name == "fsync":
                _halve(arguments[0])
            try:
                return function(*arguments, **options)
            finally:
                if is_last:
                    os.kill(os.getpid(), signal.SIGKILL)

        return counted

    def _wait_for(self, num_calls: int) -> None:
        with self._called:
            assert self._called.wait_for(lambda: len(self.calls) >= num_calls, 60), "the others do not go on"


def _halve(descriptor: int) -> None:
    """Leave half of a file that has not reached the disk."""
    state = os.fstat(descriptor)
    if stat.S_ISREG(state.st_mode):
        _truncate(descriptor, state.st_size // 2)


def trial(arguments: dict[str, Any], out: Path, at: str, when: str) -> None:
    """Run in a fork; print how it ended. The fork tells its calls through a pipe."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        killer = Killer(at, when)
        killer.arm()
        options: dict[str, Any] = {"max_shard_size": 200_000, "io": "direct"} | arguments
        base, tuned = Path(options.pop("base")), Path(options.pop("tuned"))
        state = subtract(base, tuned, 0.3, out, part=tuple(options.pop("part", (0, 1))), **options).state
        with os.fdopen(sender, "w") as pipe:
            json.dump({"state": state, "calls": killer.calls}, pipe)
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    half_written = [path.name for path in out.glob(".*.tmp")]
    print(
        json.dumps({"signal": os.WTERMSIG(status), "half_written": half_written, **json.loads(told or "{}")}),
        flush=True,
    )


def main() -> None:
    arguments, trials = json.loads(sys.argv[1]), sys.argv[2:]
    for i in range(0, len(trials), 3):
        trial(arguments, Path(trials[i]), trials[i + 1], trials[i + 2])


if __name__ == "__main__":
    main()
