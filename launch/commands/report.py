"""`flearn report`: rebuild a run's results.json and report.html; and how `flearn run` shows them."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from launch.run_folder import RunFolder
from pipeline.context import Context
from pipeline.errors import InputError
from pipeline.report.table import render
from pipeline.run_step import run_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.set_defaults(handler=_report)


def _report(arguments: argparse.Namespace) -> int:
    plan = RunFolder(arguments.run_dir).plan()
    run_folder = RunFolder(plan.run_dir)
    missing = [step.id for step in plan.pending() if step.id != plan.report.id]
    if missing:
        unfinished = f"{len(missing)} steps have not finished ({missing[0]}, ...)"
        raise InputError(f"{plan.run_dir}: {unfinished}; run the experiment again first")
    with run_folder.exclusive():
        plan.artifact(plan.report).retract()
        run_step(plan, plan.report, Context())
        run_folder.publish(plan)
    show(run_folder)
    return 0


def show(run_folder: RunFolder) -> None:
    """Print the results as a table, and where the report lies."""
    results = json.loads(run_folder.results.read_text(encoding="utf-8"))
    print(render(results, shutil.get_terminal_size((120, 40)).columns))
    print(f"\nreport: {run_folder.report}")
