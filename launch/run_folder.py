"""A run's folder: where each of its files lies, its plans and jobs, and the lock of who is at work there.

<run>/plan.json                        the steps of the last `flearn run`
<run>/plan-<fingerprint>.json          the same for each plan that was submitted
<run>/.lock                            host and process id of who is at work
<run>/jobs.json, jobs/                 job ids by step, and what the jobs printed
<run>/logs/rank<r>.log                 what ranks other than 0 printed
<run>/results.json, report.html        the last finished report
<run>/<step>/rank<r>.log, error.json   what a step's ranks logged, and why it failed
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import write_json, write_text
from pipeline.errors import InputError
from pipeline.plan import Plan

LOCAL = "local:"
"""Begins the id of a job that submitit ran on this machine; SLURM's ids are numbers."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, `<cluster.runs_dir>/<name>`."""

    path: Path

    # ---- plans

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    def plan(self) -> Plan:
        """The plan of the last `flearn run`. Raises InputError if there is none."""
        return read_plan(self.plan_file)

    def all_plans(self) -> Plan:
        """The last plan, and after its steps those that earlier plans have in the queue."""
        plan = self.plan()
        jobs = self.jobs()
        for path in sorted(self.path.glob("plan-*.json")):
            for id, step in read_plan(path).steps.items():
                if id in jobs:
                    plan.steps.setdefault(id, step)
        return plan

    def write_plan(self, plan: Plan) -> Path:
        """Make `plan` the run's last one; returns its file."""
        write_json(self.plan_file, plan.to_json())
        return self.plan_file

    def submit_plan(self, plan: Plan) -> Path:
        """Make `plan` the run's last one, and return a file of its own: `plan.json` may change before the
        jobs start.
        """
        path = self.path / f"plan-{plan.report.fingerprint}.json"
        write_json(path, plan.to_json())
        self.write_plan(plan)
        return path

    # ---- jobs

    @property
    def jobs_folder(self) -> Path:
        """Where submitit keeps the jobs' scripts and what they print."""
        return self.path / "jobs"

    def jobs(self) -> dict[str, str]:
        """The job id of each step that was ever submitted."""
        path = self.path / "jobs.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def add_jobs(self, jobs: dict[str, str]) -> None:
        """Note the job ids of these steps, in place of earlier ones."""
        write_json(self.path / "jobs.json", self.jobs() | jobs)

    def job_logs(self, job: str | None) -> list[Path]:
        """What the tasks of a job, or of all jobs of an array, wrote to standard error, in their order.

        SLURM's and srun's own words are there, too. Empty for no job.
        """
        if job is None:
            return []
        # submitit's names: <job>[_<index in the array>]_<task>_log.err
        logs = self.jobs_folder.glob(f"{job.removeprefix(LOCAL)}_[0-9]*_log.err")
        return sorted(logs, key=lambda path: [int(number) for number in path.name.split("_")[:-1]])

    # ---- logs and results

    def rank_log(self, rank: int) -> Path:
        """What a rank other than 0 of this machine printed."""
        return self.path / "logs" / f"rank{rank}.log"

    def step(self, id: str) -> StepFolder:
        return StepFolder(self.path / id)

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def publish(self, plan: Plan) -> None:
        """Copy the finished report of `plan` to the top of the run's folder, where people look for it."""
        folder = plan.artifact(plan.report).folder
        for target in (self.results, self.report):
            text = (folder / target.name).read_text(encoding="utf-8")
            if not target.is_file() or target.read_text(encoding="utf-8") != text:
                write_text(target, text)

    # ---- the lock

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    @contextmanager
    def exclusive(self, seconds: float = 0) -> Iterator[int]:
        """Hold the run's lock. Yields its descriptor: child processes that inherit it hold the lock, too, for
        as long as one lives.

        `seconds` is how long to wait for others. Raises InputError if they are still at work then, or if
        nothing can be written here.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise InputError(
                f"cannot write in {self.path} ({error.strerror}): set cluster.runs_dir to a folder of yours"
            ) from None
        if not lock(descriptor, seconds):
            os.close(descriptor)
            raise InputError(f"{self.path}: another run is at work here; wait for it, or use --set name=...")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.uname().nodename} {os.getpid()}\n".encode(), 0)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def is_alive(self) -> bool:
        """Whether processes of this machine are at work in the run: they hold its lock."""
        try:
            descriptor = os.open(self._lock, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)

    def holder(self) -> tuple[str, int]:
        """Host and process id of who took the lock last."""
        host, pid = self._lock.read_text(encoding="utf-8").split()
        return host, int(pid)


@dataclass(frozen=True)
class StepFolder:
    """What those who run a step leave in its folder, beside the stage's own files."""

    path: Path

    @property
    def lock(self) -> Path:
        """Held by rank 0 of the job that works on the step."""
        return self.path / ".lock"

    def log(self, rank: int) -> Path:
        return self.path / f"rank{rank}.log"

    def logs(self) -> list[Path]:
        """The logs of all ranks, by rank."""
        logs = self.path.glob("rank*.log")
        return sorted(logs, key=lambda path: int(path.stem.removeprefix("rank")))

    def error(self, part: tuple[int, int] | None) -> Path:
        """Why the step failed, or one (index, number) of the parts that share it; absent if it did not."""
        return self.path / ("error.json" if part is None else f"error-part-{part[0] + 1}.json")

    def note_error(self, part: tuple[int, int] | None, rank: int, message: str) -> None:
        """Write why `rank` failed.

        SLURM counts how often it has started a job again: an error of an earlier attempt is out of date.
        """
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
        error = {"rank": rank, "message": message, "log": self.log(rank).name, "attempt": attempt}
        write_json(self.error(part), error)

    def errors(self) -> list[dict[str, Any]]:
        """What `note_error` wrote, of all parts."""
        found = []
        for path in self._error_files():
            try:
                found.append(json.loads(path.read_text(encoding="utf-8")))
            except FileNotFoundError:  # a job that begins again removes it
                continue
        return found

    def clear_errors(self) -> None:
        """Before the step is submitted again."""
        for path in self._error_files():
            path.unlink(missing_ok=True)

    def _error_files(self) -> list[Path]:
        return sorted(self.path.glob("error*.json"))


def read_plan(path: Path) -> Plan:
    """The plan in this file of a run's folder. Raises InputError if it is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path.parent}: no {path.name} here; give the folder that `flearn run` printed"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); run the experiment again") from None
    plan = Plan.from_json(value)
    plan.run_dir = path.parent.absolute()  # a run's folder may have been moved
    return plan


def lock(descriptor: int, seconds: float) -> bool:
    """Take a file's lock; False if others still hold it after `seconds`, or after one second if that is more.

    Processes of a killed run, and `flearn status`, may hold it for a moment yet.
    """
    deadline = time.monotonic() + max(1.0, seconds)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
