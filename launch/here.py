"""Run a plan as processes of this machine: one a rank, env:// rendezvous; one that dies ends them all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from launch.run_folder import RunFolder
from launch.worker import MISTAKE, STOPPED

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 1.0


def run(plan: Path, ranks: int, lock: int) -> int:
    """Run the pending steps of the plan file with `ranks` processes, which inherit the descriptor `lock`.

    Returns the exit code of the first that failed, or 0. A signal asks them to save and stop; the code is
    then 128 + its number.
    """
    run_folder = RunFolder(plan.parent)
    port = _free_port()
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)

    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    previous = {number: signal.signal(number, forward) for number in stops}
    processes = [_start(plan, rank, ranks, port, lock) for rank in range(ranks)]
    try:
        code = _wait(processes, received, run_folder)
    finally:
        _kill(processes)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code == STOPPED:
        said = "flearn: stopped; what is done is kept, and the same command goes on from there"
        print(said, file=sys.stderr)
        return 128 + received[0] if received else STOPPED
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(plan: Path, rank: int, ranks: int, port: int, lock: int) -> subprocess.Popen[bytes]:
    """Start one rank. Rank 0 keeps the terminal; the others write to a file each."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "launch.worker", str(plan)]
    log = RunFolder(plan.parent).rank_log(rank)
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environment,
            pass_fds=[lock],
            preexec_fn=_die_with_parent,
            start_new_session=True,  # a Ctrl-C reaches the launcher alone, which passes it on once
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else output,
            stderr=None if rank == 0 else output,
        )


def _die_with_parent() -> None:
    """A killed launcher leaves no ranks behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(processes: list[subprocess.Popen[bytes]], received: list[int], run_folder: RunFolder) -> int:
    """Wait until all ranks succeed or one fails; signals that arrive meanwhile are passed on."""
    num_forwarded = 0
    while True:
        codes = [process.poll() for process in processes]
        failed = {rank: code for rank, code in enumerate(codes) if code}
        if failed:
            if 0 not in failed:  # it may be about to say the same on the terminal
                with contextlib.suppress(subprocess.TimeoutExpired):
                    failed[0] = processes[0].wait(_GRACE_SECONDS)
            return _culprit({rank: code for rank, code in failed.items() if code}, run_folder)
        if None not in codes:
            return 0
        for number in received[num_forwarded:]:
            for process in processes:
                process.send_signal(number)
        num_forwarded = len(received)
        time.sleep(_POLL_SECONDS)


def _culprit(failed: dict[int, int], run_folder: RunFolder) -> int:
    """The exit code to report, of the rank that failed first; says what its own output does not.

    A rank that lost its peer fails as well, a moment later, with code 1. So a code of our own (a mistake, a
    stop) comes before it, and then a signal (a negative code).
    """
    rank = min(failed, key=lambda rank: (failed[rank] not in (MISTAKE, STOPPED), failed[rank] > 0, rank))
    code = failed[rank]
    if code < 0:
        name = signal.Signals(-code).name
        print(f"flearn: rank {rank} was killed by signal {-code} ({name})", file=sys.stderr)
        return 128 - code
    if code != STOPPED and rank != 0:  # rank 0 has said it on the terminal
        print("\n".join(_end_of_log(rank, code, run_folder)), file=sys.stderr)
    return code


def _end_of_log(rank: int, code: int, run_folder: RunFolder) -> list[str]:
    """The line that a mistake is, or the end of the log."""
    lines = run_folder.rank_log(rank).read_text(encoding="utf-8", errors="replace").splitlines()
    own = [line for line in lines if line.startswith("flearn: ")]
    if code == MISTAKE and own:
        return own[-1:]
    return [f"flearn: rank {rank} failed; the end of its log:", *lines[-20:]]


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
