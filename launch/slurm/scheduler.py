"""SLURM's commands: what it says of jobs (squeue, sacct), another turn (scontrol requeue), scancel."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

from pipeline.context import log
from pipeline.errors import InputError

AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING")
ACTIVE = (*AT_WORK, "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")
"""States that may still end well."""


class JobState(NamedTuple):
    """A job as SLURM sees it."""

    state: str
    """SLURM's word, such as RUNNING, FAILED or OUT_OF_MEMORY."""
    reason: str = ""
    """Why a job waits, where it does."""

    @property
    def is_active(self) -> bool:
        """Whether it may still end well."""
        return self.state in ACTIVE and self.reason != "DependencyNeverSatisfied"


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Each job's state, of an array the state that matters most; jobs that SLURM has forgotten are left out.

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
    """Add what `states`' commands printed: a line `job|state[|reason]` for each job or task of an array."""
    if "Invalid job id" not in done.stderr and done.returncode and "squeue" in done.args[0]:
        raise InputError(f"squeue failed: {' '.join(done.stderr.split())}")
    for line in done.stdout.splitlines():
        job, state, *reason = line.split("|")
        id = job.split("_")[0]
        found[id] = _worse(found.get(id), JobState(state.split()[0], reason[0] if reason else ""))


def _worse(one: JobState | None, other: JobState) -> JobState:
    return other if one is None else max(one, other, key=_weight)


def _weight(job: JobState) -> int:
    """In an array: at work, before waiting, before failed, before done."""
    if job.state in ACTIVE:
        return 3 if job.state != "PENDING" else 2
    return 1 if job.state != "COMPLETED" else 0


def require_controller() -> None:
    """Raise InputError if SLURM's controller does not answer: sbatch would try for minutes, squeue for half
    of one.
    """
    answer = _run(["scontrol", "ping"])
    if " UP" not in answer.stdout:
        said = (answer.stdout + answer.stderr).strip().partition("\n")[0]  # below it are asterisks
        raise InputError(f"SLURM's controller does not answer ({said})")


def come_back() -> str | None:
    """Put this process's job back into the queue under its own id, so that what depends on it keeps waiting.

    Only a job that SLURM calls RUNNING: a cancelled one would come back, and SLURM may be requeueing it
    itself. Returns why the job cannot come back, or None.
    """
    job_id = _own_job()
    if shutil.which("scontrol") is None:
        return (
            f"saved, but job {job_id} cannot queue itself again, for there is no scontrol in this container:"
            " run the same command again"
        )
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
    """The id of this process's job. In an array SLURM_JOB_ID of one task is that of the whole array."""
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
        message = f"{command[0]}: not found: this machine has no SLURM; start it on a login node"
        raise InputError(message) from None
    except subprocess.TimeoutExpired:
        message = f"{command[0]} did not answer in 60 s: is SLURM's controller up? (scontrol ping)"
        raise InputError(message) from None
