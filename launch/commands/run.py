"""`flearn run`: plan an experiment, run what is not yet done, publish the report."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from launch.outcome import STOPPED
from pipeline import config
from pipeline.artifact import write_json
from pipeline.config import Experiment
from pipeline.errors import InputError
from pipeline.plan import Plan, make_plan

PLAN = "plan.json"
LOCK = ".lock"
ALLOCATION = "FLEARN_ALLOCATION"
"""Set by slurm/single_allocation.sh: this command is one task of a job that does nothing else, and may ask
for another turn of it.
"""
_ON = "here: processes of this machine (default); slurm: a chain of jobs; local: the same jobs on this machine, one after another"


def add_parser(commands: Any) -> None:
    """Add `run` to the command line."""
    parser = commands.add_parser("run", help="run what is not yet done of an experiment")
    parser.add_argument("config", type=Path, help="the experiment's YAML")
    parser.add_argument("--on", choices=["here", "local", "slurm"], default="here", help=_ON)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a field, such as forget.scale=0.5",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.set_defaults(handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if ALLOCATION in os.environ:
        from launch.slurm import job

        job.export_ranks()
    if arguments.on == "here" and _is_one_rank():
        overrides += [f"cluster.ranks={os.environ['WORLD_SIZE']}", "cluster.nodes=1"]
    experiment = config.load(arguments.config, overrides)
    plan = make_plan(experiment)
    if arguments.dry_run:
        print(describe(plan))
        return 0 if arguments.on == "here" else _show_scripts(experiment, plan)
    return _run_here(plan, experiment) if arguments.on == "here" else _submit(arguments)


def _show_scripts(experiment: Experiment, plan: Plan) -> int:
    from launch.slurm import chain

    for step, script in chain.scripts(experiment, plan):
        print(f"\n# ---- {step.id}\n{script}")
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from launch import submit
    from launch.commands import report

    submitted = submit(arguments.config, arguments.overrides, arguments.on)
    if arguments.on == "local":
        report.show(read_plan(submitted.run_dir))
    elif not submitted.jobs:
        print(f"{submitted.run_dir}: all steps are done; nothing to submit")
    else:
        for step, job in submitted.jobs.items():
            print(f"  job {job:<10} {step}")
        print(
            f"{submitted.run_dir}: {len(submitted.jobs)} jobs; see how far they are with: flearn status {submitted.run_dir}"
        )
    return 0


def _run_here(plan: Plan, experiment: Experiment) -> int:
    from launch.commands import report

    if _is_one_rank():
        return _run_as_rank(plan)
    with exclusive(plan.run_dir) as lock:
        write_json(plan.run_dir / PLAN, plan.to_json())
        pending = list(plan.pending())
        if pending:
            from launch import here

            with suppress(BrokenPipeError):  # the steps are done whether or not anybody reads this
                print(f"{plan.run_dir}: {len(pending)} of {len(plan.steps)} steps to do", flush=True)
            code = here.run(plan.run_dir / PLAN, experiment.cluster.ranks, lock)
            if code:
                return code
        else:
            print(f"{plan.run_dir}: all {len(plan.steps)} steps are done; nothing to run", flush=True)
        report.publish(plan)
        report.show(plan)
    return 0


def _is_one_rank() -> bool:
    """Whether torchrun or srun started this command once for each rank."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _run_as_rank(plan: Plan) -> int:
    """Be one rank among those that torchrun or srun started with this same command, perhaps on several
    machines.
    """
    from launch import worker
    from launch.commands import report
    from launch.slurm import job

    is_main = os.environ["RANK"] == "0"
    with exclusive(plan.run_dir) if is_main else nullcontext():
        if is_main:
            write_json(plan.run_dir / PLAN, plan.to_json())
        context = worker.join()
        code = worker.run_all(plan, [step.id for step in plan.pending()], context)
        if is_main and code == 0:
            report.publish(plan)
            report.show(plan)
        if is_main and code == STOPPED and ALLOCATION in os.environ:
            job.come_back(plan, next(plan.pending()).id, None)
        worker.leave(code, context)


def describe(plan: Plan) -> str:
    """The plan as text: one line a step, with its state."""
    pending = {step.id for step in plan.pending()}
    width = max(len(id) for id in plan.steps)
    lines = [f"{plan.run_dir}: {len(plan.steps)} steps, {len(pending)} to do"]
    for step in plan.steps.values():
        lines.append(
            f"  {'to do' if step.id in pending else 'done '}  {step.id:<{width}}  {', '.join(step.methods) or 'all methods'}"
        )
    return "\n".join(lines)


def lock(descriptor: int, seconds: float) -> bool:
    """Take the file's lock; False if it did not become free within `seconds` (a second at least).

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


@contextmanager
def exclusive(run_dir: Path, seconds: float = 0) -> Iterator[int]:
    """Hold the run's lock; yields its descriptor, which child processes inherit and so keep for as long as
    one lives.

    The lock's file says who holds it: host and process id. Others are given `seconds` to finish.
    Raises InputError if another run is at work in the same folder.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(
            f"cannot write in {run_dir} ({error.strerror}): set cluster.runs_dir to a folder of yours"
        ) from None
    if not lock(descriptor, seconds):
        os.close(descriptor)
        raise InputError(f"{run_dir}: another run is at work here; wait for it, or use --set name=...")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.uname().nodename} {os.getpid()}\n".encode(), 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_plan(run_dir: Path, name: str = PLAN) -> Plan:
    """The plan of the last `flearn run` in `run_dir`, or the one that lies there under `name`."""
    try:
        value = json.loads((run_dir / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{run_dir}: no {name} here; give the folder that `flearn run` printed") from None
    except ValueError as error:
        raise InputError(f"{run_dir / name}: damaged ({error}); run the experiment again") from None
    plan = Plan.from_json(value)
    plan.run_dir = run_dir.absolute()  # a run's folder may have been moved
    return plan
