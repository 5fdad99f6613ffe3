"""`flearn logs`: what a stage of a run said, rank by rank, and what its job printed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.commands.status import read_all
from launch.slurm.chain import job_files, read_jobs
from pipeline.errors import InputError
from pipeline.plan import Plan, Step


def add_parser(commands: Any) -> None:
    """Add `logs` to the command line."""
    logs = commands.add_parser("logs", help="what a stage of a run said")
    logs.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    logs.add_argument(
        "stage",
        nargs="?",
        metavar="STAGE",
        help="a step's id or its beginning; without it, the last one that ran",
    )
    logs.set_defaults(handler=_logs)


def _logs(arguments: argparse.Namespace) -> int:
    plan = read_all(arguments.run_dir)
    for log in _files(plan, _find(plan, arguments.stage)):
        print(f"==> {log} <==")
        print(log.read_text(encoding="utf-8", errors="replace"))
    return 0


def _files(plan: Plan, step: Step) -> list[Path]:
    """The ranks' logs, and what the step's job wrote to its standard error (srun's and SLURM's own words are
    there).
    """
    ranks = sorted(
        plan.artifact(step).folder.glob("rank*.log"), key=lambda path: int(path.stem.removeprefix("rank"))
    )
    return ranks + [
        path
        for path in job_files(plan.run_dir, read_jobs(plan.run_dir).get(step.id), "err")
        if path.stat().st_size
    ]


def _find(plan: Plan, stage: str | None) -> Step:
    started = {step.id: files for step in plan.steps.values() if (files := _files(plan, step))}
    if stage is None:
        if not started:
            raise InputError(f"{plan.run_dir}: nothing has run yet")
        return plan.steps[max(started, key=lambda id: max(log.stat().st_mtime for log in started[id]))]
    matching = [id for id in started if id.startswith(stage)]
    if len(matching) != 1:
        ids = ", ".join(matching or started)
        raise InputError(
            f"{stage}: {len(matching)} steps of {plan.run_dir} with a log begin so; name one of: {ids}"
        )
    return plan.steps[matching[0]]
