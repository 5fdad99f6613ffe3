"""`flearn cancel`: stop a run, its jobs in the queue or its processes on this machine. What is done is
kept.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from launch.commands.run import LOCK
from launch.commands.status import is_alive, read_all
from launch.slurm import scheduler
from launch.slurm.chain import read_jobs
from pipeline.errors import InputError


def add_parser(commands: Any) -> None:
    """Add `cancel` to the command line."""
    cancel = commands.add_parser("cancel", help="stop a run; what is done is kept")
    cancel.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    cancel.set_defaults(handler=_cancel)


def _cancel(arguments: argparse.Namespace) -> int:
    plan = read_all(arguments.run_dir)
    if is_alive(plan.run_dir):
        _stop_launcher(plan.run_dir)
        print(f"{plan.run_dir}: asked to save and stop")
    known = read_jobs(plan.run_dir)
    jobs = [known[step.id] for step in plan.pending() if known.get(step.id, "").isdecimal()]
    active = [job for job, state in scheduler.states(jobs).items() if state.state in scheduler.ACTIVE]
    scheduler.cancel(active)
    print(f"{plan.run_dir}: {len(active)} jobs cancelled")
    return 0


def _stop_launcher(run_dir: Path) -> None:
    host, pid = (run_dir / LOCK).read_text(encoding="utf-8").split()
    if host != os.uname().nodename:
        raise InputError(f"{run_dir}: the run is at work on {host}: cancel it there")
    os.kill(int(pid), signal.SIGTERM)
