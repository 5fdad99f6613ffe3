"""`flearn status` and `flearn logs`: how far a run is, what failed, and what its stages said."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from launch.outcome import ERROR
from launch.run import read_plan
from pipeline.errors import InputError
from pipeline.stages import Plan, Step


def add_parser(commands: Any) -> None:
    """Add `status` and `logs` to the command line."""
    status = commands.add_parser("status", help="stages of a run, their states and times")
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    status.add_argument("--json", action="store_true", help="print a JSON array, one object a step")
    status.set_defaults(handler=_status)
    logs = commands.add_parser("logs", help="what a stage of a run said")
    logs.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    logs.add_argument("stage", nargs="?", metavar="STAGE", help="a step's id or its beginning; without it, the last one that ran")
    logs.set_defaults(handler=_logs)


def _status(arguments: argparse.Namespace) -> int:
    plan = read_plan(arguments.run_dir)
    rows = states(plan)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max(len(row["id"]) for row in rows)
    print(f"{plan.run_dir}: {sum(row['state'] == 'done' for row in rows)} of {len(rows)} steps done")
    for row in rows:
        seconds = f"{row['seconds']:8.1f} s" if row["seconds"] is not None else " " * 10
        print(f"  {row['state']:<8} {row['id']:<{width}} {seconds}  {', '.join(row['methods']) or 'all methods'}  {row['note']}".rstrip())
    return 0


def states(plan: Plan) -> list[dict[str, Any]]:
    """For each step: id, methods, state (done | running | stopped | failed | pending), seconds, and a note.

    `stopped` is a step that began and is not at work now: the same `flearn run` goes on with it.
    """
    alive = _is_alive(plan.run_dir)
    rows = []
    for step in plan.steps.values():
        rows.append(_state(plan, step, alive))
        if rows[-1]["state"] == "running":
            alive = False  # steps run one after the other
    return rows


def _state(plan: Plan, step: Step, alive: bool) -> dict[str, Any]:
    artifact = plan.artifact(step)
    row: dict[str, Any] = {"id": step.id, "methods": step.methods, "state": "pending", "seconds": None, "note": ""}
    if artifact.is_complete:
        return row | {"state": "done", "seconds": artifact.manifest["seconds"], "finished": artifact.manifest["finished"]}
    error = artifact.folder / ERROR
    if error.is_file() and not alive:
        problem = json.loads(error.read_text(encoding="utf-8"))
        return row | {"state": "failed", "note": f"{problem['message']} (see {artifact.folder / problem['log']})"}
    if not artifact.folder.is_dir():
        return row
    return row | {"state": "running" if alive else "stopped", "note": _progress(artifact.folder)}


def _is_alive(run_dir: Path) -> bool:
    """Whether processes of this run are at work: they hold its lock."""
    try:
        descriptor = os.open(run_dir / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _progress(folder: Path) -> str:
    """The last training step that was logged, if the stage trains."""
    log = folder / "steps.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    if not lines:
        return ""
    try:
        step = json.loads(lines[-1])
    except ValueError:  # its last line is being written
        return ""
    return f"step {step['step']}, loss {step['loss']:.4f}"


def _logs(arguments: argparse.Namespace) -> int:
    plan = read_plan(arguments.run_dir)
    step = _find(plan, arguments.stage)
    for log in sorted(plan.artifact(step).folder.glob("rank*.log"), key=lambda path: int(path.stem.removeprefix("rank"))):
        print(f"==> {log} <==")
        print(log.read_text(encoding="utf-8", errors="replace"))
    return 0


def _find(plan: Plan, stage: str | None) -> Step:
    started = [step for step in plan.steps.values() if list(plan.artifact(step).folder.glob("rank*.log"))]
    if stage is None:
        if not started:
            raise InputError(f"{plan.run_dir}: nothing has run yet")
        return max(started, key=lambda step: max(log.stat().st_mtime for log in plan.artifact(step).folder.glob("rank*.log")))
    matching = [step for step in started if step.id.startswith(stage)]
    if len(matching) != 1:
        ids = ", ".join(step.id for step in matching or started)
        raise InputError(f"{stage}: {len(matching)} steps of {plan.run_dir} with a log begin so; name one of: {ids}")
    return matching[0]
