"""`flearn cancel`: stop a run, its jobs in the queue or its processes here. What is done is kept."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

from launch.run_folder import RunFolder
from launch.slurm import scheduler
from pipeline.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.set_defaults(handler=_cancel)


def _cancel(arguments: argparse.Namespace) -> int:
    plan = RunFolder(arguments.run_dir).all_plans()
    run_folder = RunFolder(plan.run_dir)
    if run_folder.is_alive():
        _stop_launcher(run_folder)
        print(f"{plan.run_dir}: asked to save and stop")
    known = run_folder.jobs()
    jobs = [known[step.id] for step in plan.pending() if known.get(step.id, "").isdecimal()]
    active = [job for job, state in scheduler.states(jobs).items() if state.state in scheduler.ACTIVE]
    scheduler.cancel(active)
    print(f"{plan.run_dir}: {len(active)} jobs cancelled")
    return 0


def _stop_launcher(run_folder: RunFolder) -> None:
    host, pid = run_folder.holder()
    if host != os.uname().nodename:
        raise InputError(f"{run_folder.path}: the run is at work on {host}: cancel it there")
    os.kill(pid, signal.SIGTERM)
