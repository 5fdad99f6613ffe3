"""What SLURM says of jobs, and cancelling them: sacct, squeue where there is no accounting, scancel."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

from pipeline.errors import InputError

ACTIVE = frozenset({"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING", "NODE_FAIL"})
"""States that may still end well. NODE_FAIL is among them: a requeued job is in it for a moment."""


def states(job_ids: Iterable[str]) -> dict[str, str]:
    """Each job's state, such as PENDING, RUNNING, COMPLETED, FAILED; jobs that SLURM has forgotten are left out.

    An array is given by its job id; of its tasks' states the worst counts.
    """
    ids = sorted(set(job_ids))
    if not ids:
        return {}
    found: dict[str, str] = {}
    for line in _query(ids):
        job, state = line.split("|")[:2]
        id = job.split("_")[0]
        found[id] = _worse(found.get(id), state.split()[0])
    return found


def _query(ids: list[str]) -> list[str]:
    accounting = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={','.join(ids)}"]
    queue = ["squeue", "--noheader", "--states=all", "--array", "--format=%F|%T", f"--jobs={','.join(ids)}"]
    for command in (accounting, queue):
        done = _run(command)
        lines = [line for line in done.stdout.splitlines() if "|" in line]
        if done.returncode == 0 and lines:
            return lines
    return []


_SEVERITY = ("COMPLETED", "PENDING", "RUNNING")


def _worse(one: str | None, other: str) -> str:
    if one is None:
        return other
    return max(one, other, key=lambda state: _SEVERITY.index(state) if state in _SEVERITY else len(_SEVERITY))


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs; those that have ended already are no error."""
    ids = list(job_ids)
    if ids:
        _run(["scancel", *ids])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise InputError(f"{command[0]}: not found: this machine has no SLURM; start it on a login node") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]} did not answer in 60 s: is the SLURM controller up? (scontrol ping)") from None
