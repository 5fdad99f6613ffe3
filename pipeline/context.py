"""What a stage may know about where it runs: its rank, its device, and whether to stop.

With one rank nothing is distributed, and every collective is a no-op.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

log = logging.getLogger("flearn")


class Preempted(Exception):
    """The run was asked to stop. What was done is saved, and the same command goes on from there."""


@dataclass
class Context:
    """One process's place in a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    group: Any = None
    """A gloo process group for control messages; None with one rank."""
    part: tuple[int, int] | None = None
    """(index from 0, number of parts) where processes share one artifact without talking to each other;
    None: all of the work is this process's.
    """
    stop: bool = field(default=False, init=False)
    """Whether this rank was asked to stop; after `should_stop`, whether any rank was."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def listen(self) -> None:
        """Take SIGTERM, SIGINT and SIGUSR2 as requests to stop at the next safe point.

        A further SIGINT stops at once.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop. Collective: every rank gets the same answer."""
        if self.group is None:
            return self.stop
        import torch
        import torch.distributed as dist

        asked = torch.tensor([int(self.stop)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        agreed = bool(asked.item())
        # A signal may have come since: it counts from the next time on, or the ranks would disagree.
        self.stop = self.stop or agreed
        return agreed

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            import torch.distributed as dist

            dist.barrier(group=self.group)

    def largest(self, value: int) -> int:
        """The largest of all ranks' values. Collective."""
        if self.group is None:
            return value
        import torch
        import torch.distributed as dist

        largest = torch.tensor([value])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest.item())

    def share(self, value: Any) -> Any:
        """Rank 0's `value` (picklable), on every rank."""
        if self.group is None:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "") -> Iterator[Progress]:
        """A bar on rank 0's terminal; nothing on other ranks, or without a terminal."""
        with Progress(description, unit, shown=self.is_main) as progress:
            progress.start(total)
            yield progress


class Progress:
    """Where work reports that it moves on: a bar on a terminal, nothing elsewhere. A context manager."""

    def __init__(self, description: str, unit: str = "", shown: bool = True) -> None:
        """`unit` follows the numbers; `bytes` are shown with their rate."""
        self._description = description
        self._unit = unit
        self._shown = shown and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None

    def start(self, total: int) -> None:
        """Show the bar: `total` is to be done. Before that nothing is shown, for the work may be refused."""
        if not self._shown or total == 0:
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        amounts = (
            (DownloadColumn(), TransferSpeedColumn()) if self._unit == "bytes" else (MofNCompleteColumn(),)
        )
        note = TextColumn(("" if self._unit == "bytes" else self._unit) + " {task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), *amounts, note, TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._description, total=total, note="")
        self._bar.start()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """`amount` more of the total is done; `note` is shown beside the bar (a loss, a rate)."""
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, note=note)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def peak_memory_bytes() -> int:
    """This process's highest resident memory so far (VmHWM), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmHWM")


def peak_gpu_memory_bytes(device: str) -> int | None:
    """The most memory that torch held on this rank's GPU so far, in bytes; None on a CPU."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.max_memory_allocated(device)


def reset_peak_memory(device: str) -> None:
    """Start measuring both peaks anew: a process runs many stages, and each has its own figures."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        log.debug("this kernel does not reset VmHWM: peaks are those of the whole process")


def device_for(local_rank: int) -> str:
    """This rank's GPU where there is one, else the CPU."""
    import torch

    return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
