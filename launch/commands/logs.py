"""`flearn logs`: what a stage of a run said, rank by rank, and what its job printed."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.run_folder import RunFolder
from pipeline.errors import InputError
from pipeline.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    which = "a step's id or its beginning; without it, the last one that ran"
    parser.add_argument("stage", nargs="?", metavar="STAGE", help=which)
    parser.set_defaults(handler=_logs)


def _logs(arguments: argparse.Namespace) -> int:
    plan = RunFolder(arguments.run_dir).all_plans()
    for log in _logs_of(plan, arguments.stage):
        print(f"==> {log} <==")
        print(log.read_text(encoding="utf-8", errors="replace"))
    return 0


def _logs_of(plan: Plan, beginning: str | None) -> list[Path]:
    """The logs of the step whose id begins so, or of the last one that ran.

    Raises InputError unless there is exactly one such step with a log.
    """
    found = _all_logs(plan)
    if beginning is None:
        if not found:
            raise InputError(f"{plan.run_dir}: nothing has run yet")
        return max(found.values(), key=lambda logs: max(log.stat().st_mtime for log in logs))
    matching = [id for id in found if id.startswith(beginning)]
    if len(matching) != 1:
        steps = f"{len(matching)} steps of {plan.run_dir} with a log begin so"
        raise InputError(f"{beginning}: {steps}; name one of: {', '.join(matching or found)}")
    return found[matching[0]]


def _all_logs(plan: Plan) -> dict[str, list[Path]]:
    """By id of each step that has begun: its ranks' logs, and what its job printed, if anything."""
    run_folder = RunFolder(plan.run_dir)
    jobs = run_folder.jobs()
    found = {}
    for id in plan.steps:
        of_job = [path for path in run_folder.job_logs(jobs.get(id)) if path.stat().st_size]
        if logs := run_folder.step(id).logs() + of_job:
            found[id] = logs
    return found
