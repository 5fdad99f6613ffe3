"""`flearn status`: how far a run is, what runs and waits, what failed, why, and where its log is."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from launch.run_folder import RunFolder, StepFolder
from launch.slurm import scheduler
from launch.slurm.chain import ATTEMPT
from launch.slurm.scheduler import JobState
from pipeline.errors import InputError
from pipeline.plan import Plan, Step
from pipeline.weights.journal import INCOMPLETE

Row = dict[str, Any]
_SRUN = re.compile(r"^srun: error: (\S+): tasks? (\S+): (.*)$", flags=re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="print a JSON array, one object a step")
    parser.set_defaults(handler=_status)


def _status(arguments: argparse.Namespace) -> int:
    plan = RunFolder(arguments.run_dir).all_plans()
    rows = states(plan)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max(len(row["id"]) for row in rows)
    job_width = max(len(row["job"] or "") for row in rows)
    print(f"{plan.run_dir}: {sum(row['state'] == 'done' for row in rows)} of {len(rows)} steps done")
    for row in rows:
        seconds = f"{row['seconds']:8.1f} s" if row["seconds"] is not None else " " * 10
        columns = (f"{row['state']:<9}", f"{row['id']:<{width}}", f"{row['job'] or '':<{job_width}}", seconds)
        print("  " + "  ".join([*columns, plan.steps[row["id"]].users, row["note"]]).rstrip())
    return 0


def states(plan: Plan) -> list[Row]:
    """For each step: id, methods, seeds, state, job, seconds, and a note.

    The state is done | running | queued | failed | cancelled | stopped | pending. `stopped` is a step that
    began and is not at work now, `cancelled` one whose job was: the same `flearn run` goes on with both.
    """
    run_folder = RunFolder(plan.run_dir)
    alive = run_folder.is_alive()
    jobs = run_folder.jobs()
    found = _ask({step.id: jobs[step.id] for step in plan.pending() if step.id in jobs})
    rows = []
    for step in plan.steps.values():
        rows.append(_state(plan, step, jobs.get(step.id), found.get(step.id), alive))
        if rows[-1]["state"] == "running" and step.id not in found:
            alive = False  # without a scheduler, steps run one after the other
    return rows


def _ask(jobs: dict[str, str]) -> dict[str, JobState]:
    """By step, the state of its SLURM job. Where SLURM does not answer, says so and returns none."""
    ids = {step: job for step, job in jobs.items() if job.isdecimal()}
    if not ids or shutil.which("squeue") is None:
        return {}
    try:
        scheduler.require_controller()
        known = scheduler.states(ids.values())
    except InputError as error:
        print(f"flearn: {error}", file=sys.stderr)
        return {}
    return {step: known[job] for step, job in ids.items() if job in known}


def _state(plan: Plan, step: Step, job: str | None, found: JobState | None, alive: bool) -> Row:
    """A row of `states`. `found` is what SLURM says of `job`; `alive`: the step may be at work here.

    What is on the disk comes first: a manifest means done, whatever SLURM says. Then a live job, and last
    what is left of one that ended.
    """
    artifact = plan.artifact(step)
    row: Row = {"id": step.id, "methods": step.methods, "seeds": step.seeds, "state": "pending"}
    row |= {"job": job, "seconds": None, "note": ""}
    if artifact.is_complete:
        finished = artifact.manifest["finished"]
        return row | {"state": "done", "seconds": artifact.manifest["seconds"], "finished": finished}
    if found is not None and found.state in scheduler.ACTIVE:
        if found.state in scheduler.AT_WORK:
            return row | {"state": "running", "note": progress(artifact.folder)}
        return row | {"state": "queued", "note": _waiting(found)}
    began = artifact.folder.is_dir()
    was_cancelled = found is not None and found.state == "CANCELLED"
    if was_cancelled and not began:
        failed = [source.id for source in step.inputs.values() if not plan.artifact(source).is_complete]
        return row | {"state": "cancelled", "note": f"needs {failed[0]}" if failed else ""}
    if not alive and (found is not None or began):
        reason = why(StepFolder(artifact.folder), RunFolder(plan.run_dir).job_logs(job), found)
        if reason is not None:
            return row | {"state": "cancelled" if was_cancelled else "failed", "note": reason}
    if not began:
        return row
    return row | {"state": "running" if alive else "stopped", "note": progress(artifact.folder)}


def _waiting(job: JobState) -> str:
    if job.reason == "DependencyNeverSatisfied":
        return "an input failed: it will never start; run again, or flearn cancel"
    return "" if job.reason in ("", "None", "Dependency", "Priority") else job.reason


def why(folder: StepFolder, stderr: list[Path], job: JobState | None) -> str | None:
    """Why a step failed and where to read more; None if nothing says that it did.

    A rank that died without a word (killed, out of memory) is known to SLURM alone: its peers blame the
    connection.
    """
    attempts = {log: _last_attempt(log) for log in stderr}
    problem = _problem(folder, attempts)
    state = job.state if job is not None and job.state not in ("COMPLETED", "FAILED") else None
    killed, log = _first_killed(attempts) if job is not None and job.state != "COMPLETED" else (None, None)
    said = [text for text in (state, killed or (problem and problem["message"])) if text]
    if problem is not None and killed is None:
        return f"{': '.join(said)} (see {folder.path / problem['log']})"
    if job is None or job.state == "COMPLETED":
        return None
    failed = [log for log, (_, text) in attempts.items() if _SRUN.search(text)]
    where = log or next(iter([*failed, *stderr]), "scontrol show job")
    return f"{': '.join(said) or job.state} (see {where})"


def _problem(folder: StepFolder, attempts: dict[Path, tuple[int, str]]) -> dict[str, Any] | None:
    """What the step, or one of its parts, said of its failure in the last attempt."""
    last = min((number for number, _ in attempts.values()), default=1)
    return next((error for error in folder.errors() if error["attempt"] >= last), None)


def _last_attempt(log: Path) -> tuple[int, str]:
    """Its number, and what srun said in it."""
    _, mark, text = log.read_text(encoding="utf-8", errors="replace").rpartition(ATTEMPT)
    number = re.match(r"\d+", text) if mark else None
    return int(number[0]) if number else 1, text


def _first_killed(attempts: dict[Path, tuple[int, str]]) -> tuple[str, Path] | tuple[None, None]:
    """What srun says in the last attempt, and where, of the task that died first without words of its own.

    srun writes where a job's first task does; an array has a file for each of its tasks.
    """
    for log, (_, text) in attempts.items():
        match = _SRUN.search(text)
        if match is not None and not match[3].startswith("Exited with exit code"):
            return f"rank {match[2]} on {match[1]}: {match[3]}", log
    return None, None


def progress(folder: Path) -> str:
    """How far a step is: its last training step, or how much it has written."""
    steps = folder / "steps.jsonl"
    if steps.is_file():
        lines = steps.read_text(encoding="utf-8").splitlines()
        try:
            step = json.loads(lines[-1])
        except (IndexError, ValueError):  # its last line is being written
            return ""
        return f"step {step['step']}, loss {step['loss']:.4f}"
    rows = sum(part.read_bytes().count(b"\n") for part in folder.glob("records-rank*.jsonl"))
    if rows:
        return f"{rows} facts scored"
    shards = len(list(folder.glob(f"model/{INCOMPLETE}/*.json")))  # a receipt each
    return f"{shards} shards written" if shards else ""
