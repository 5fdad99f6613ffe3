"""What SLURM says of jobs, asking it for another turn, and cancelling: squeue, sacct for what squeue has
forgotten, scontrol, scancel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

from pipeline.context import log
from pipeline.errors import InputError

ACTIVE = frozenset(
    {
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "COMPLETING",
        "CONFIGURING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "RESIZING",
        "STOPPED",
    }
)
"""States that may still end well."""


class JobState(NamedTuple):
    """`state` is SLURM's word, such as RUNNING, FAILED or OUT_OF_MEMORY; `reason` says why a job waits, where
    it does.
    """

    state: str
    reason: str = ""

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE and self.reason != "DependencyNeverSatisfied"


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Each job's state; jobs that SLURM has forgotten are left out. Of an array's tasks the one that matters
    most counts.

    The controller is asked first: the accounting hears of a submission late, and calls a job NODE_FAIL for a
    moment before it is queued again.
    """
    found: dict[str, JobState] = {}
    queue = ["squeue", "--noheader", "--states=all", "--array", "--format=%F|%T|%r"]
    accounting = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
    for command in (queue, accounting):
        ids = sorted(set(job_ids) - found.keys())
        if ids:
            _read(_run([*command, f"--jobs={','.join(ids)}"]), found)
    return found


def _read(done: subprocess.CompletedProcess[str], found: dict[str, JobState]) -> None:
    if "Invalid job id" not in done.stderr and done.returncode and "squeue" in done.args[0]:
        raise InputError(f"squeue failed: {' '.join(done.stderr.split())}")
    for line in done.stdout.splitlines():
        job, state, *reason = line.split("|")
        id = job.split("_")[0]
        found[id] = _worse(found.get(id), JobState(state.split()[0], reason[0] if reason else ""))


def _worse(one: JobState | None, other: JobState) -> JobState:
    """Of an array: a task that can still work, before one that has failed, before those that are done."""
    if one is None:
        return other
    return max(
        one,
        other,
        key=lambda job: 2 + (job.state != "PENDING") if job.state in ACTIVE else job.state != "COMPLETED",
    )


def require_controller() -> None:
    """Raise InputError if SLURM's controller does not answer: sbatch would try for minutes, squeue for half
    of one.
    """
    answer = _run(["scontrol", "ping"])
    if " UP" not in answer.stdout:
        said = (answer.stdout + answer.stderr).strip().partition("\n")[0]  # below it are asterisks
        raise InputError(f"SLURM's controller does not answer ({said})")


def come_back() -> str | None:
    """Put the job that this process is a task of back into the queue, under its own id: what depends on it
    keeps waiting.

    A job that is no longer meant to run (cancelled, timed out, or being requeued by SLURM itself) is left
    alone: a cancelled job would come back. Returns why a job that was to come back cannot, else None.
    """
    job_id = _own_job()
    if shutil.which("scontrol") is None:
        return f"saved, but job {job_id} cannot queue itself again, for there is no scontrol in this container: run the same command again"
    try:
        asked = _run(["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"])
        if asked.returncode == 0 and asked.stdout.split() != ["RUNNING"]:
            return None
        done = _run(["scontrol", "requeue", job_id])
        said = " ".join(done.stderr.split()) if done.returncode else None
    except InputError as error:
        said = str(error)
    if said is None:
        log.info("saved; job %s is queued again", job_id)
        return None
    return f"saved, but job {job_id} could not be queued again: run the same command again ({said})"


def _own_job() -> str:
    """Of an array, this task alone: the number of one of its tasks is that of the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def signal(job_id: str) -> bool:
    """Send SIGUSR2 to every task of this job, as SLURM does before its time limit."""
    return _run(["scancel", "--signal=USR2", job_id]).returncode == 0


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs; those that have ended already are no error."""
    ids = list(job_ids)
    if ids:
        _run(["scancel", *ids])


def settings() -> dict[str, str]:
    """The controller's configuration, as `scontrol show config` prints it."""
    pairs = (line.partition("=") for line in _run(["scontrol", "show", "config"]).stdout.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def objection(script: str) -> str | None:
    """What sbatch has against a script, as one line, without submitting it; None if it would be accepted."""
    done = _run(["sbatch", "--test-only"], script)
    said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()]
    return "; ".join(said) if done.returncode else None


def _run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise InputError(
            f"{command[0]}: not found: this machine has no SLURM; start it on a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{command[0]} did not answer in 60 s: is SLURM's controller up? (scontrol ping)"
        ) from None
