"""`flearn report`: rebuild a run's results.json and report.html; and how `flearn run` publishes and shows
them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.artifact import write_text
from pipeline.errors import InputError
from pipeline.plan import Plan

PUBLISHED = ("results.json", "report.html")


def add_parser(commands: Any) -> None:
    """Add `report` to the command line."""
    parser = commands.add_parser("report", help="rebuild report.html and results.json of a run")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.set_defaults(handler=_report)


def _report(arguments: argparse.Namespace) -> int:
    from launch.commands.run import exclusive, read_plan
    from pipeline.context import Context
    from pipeline.run_step import run_step

    plan = read_plan(arguments.run_dir)
    missing = [step.id for step in plan.pending() if step is not plan.report]
    if missing:
        raise InputError(
            f"{plan.run_dir}: {len(missing)} steps have not finished ({missing[0]}, ...); run the experiment again first"
        )
    with exclusive(plan.run_dir):
        plan.artifact(plan.report).retract()
        run_step(plan, plan.report, Context())
        publish(plan)
    show(plan)
    return 0


def publish(plan: Plan) -> None:
    """Put the report of this plan at the top of the run's folder, where people look for it."""
    folder = plan.artifact(plan.report).folder
    for name in PUBLISHED:
        text = (folder / name).read_text(encoding="utf-8")
        target = plan.run_dir / name
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            write_text(target, text)


def show(plan: Plan) -> None:
    """Print the results as a table, and where the report lies."""
    from pipeline.report.table import render

    results = json.loads((plan.run_dir / "results.json").read_text(encoding="utf-8"))
    print(render(results, shutil.get_terminal_size((120, 40)).columns))
    print(f"\nreport: {plan.run_dir / 'report.html'}")
