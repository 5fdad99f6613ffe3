"""`flearn run`: plan an experiment, run what is not yet done, publish the report."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext, suppress
from pathlib import Path

from launch import here, submit, worker
from launch.commands import report
from launch.run_folder import RunFolder
from launch.slurm import chain, stage_job
from pipeline import config
from pipeline.config import Experiment
from pipeline.plan import Plan, make_plan

ALLOCATION = "FLEARN_ALLOCATION"
"""Set by slurm/single_allocation.sh: this command is one task of a job that does nothing else. It may ask for
another turn of it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="the experiment's YAML")
    on = "here: processes of this machine (default); slurm: a chain of jobs; "
    on += "local: the same jobs on this machine, one after another"
    parser.add_argument("--on", choices=["here", "local", "slurm"], default="here", help=on)
    change = "change a field, such as forget.scale=0.5"
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=change
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.set_defaults(handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if ALLOCATION in os.environ:
        stage_job.export_ranks()
    if arguments.on == "here" and _is_one_rank():
        overrides += [f"cluster.ranks={os.environ['WORLD_SIZE']}", "cluster.nodes=1"]
    experiment = config.load(arguments.config, overrides)
    plan = make_plan(experiment)
    if arguments.dry_run:
        print(describe(plan))
        return 0 if arguments.on == "here" else _show_scripts(experiment, plan)
    if arguments.on != "here":
        return _submit(arguments)
    return _run_as_rank(plan) if _is_one_rank() else _run_here(plan, experiment)


def _show_scripts(experiment: Experiment, plan: Plan) -> int:
    for step, script in chain.scripts(experiment, plan):
        print(f"\n# ---- {step.id}\n{script}")
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    submitted = submit(arguments.config, arguments.overrides, arguments.on)
    run_dir, jobs = submitted.run_dir, submitted.jobs
    if arguments.on == "local":
        report.show(RunFolder(run_dir))
    elif not jobs:
        print(f"{run_dir}: all steps are done; nothing to submit")
    else:
        for step, id in jobs.items():
            print(f"  job {id:<10} {step}")
        print(f"{run_dir}: {len(jobs)} jobs; see how far they are with: flearn status {run_dir}")
    return 0


def _run_here(plan: Plan, experiment: Experiment) -> int:
    run_folder = RunFolder(plan.run_dir)
    with run_folder.exclusive() as lock:
        plan_file = run_folder.write_plan(plan)
        pending = list(plan.pending())
        if pending:
            with suppress(BrokenPipeError):  # the steps are done whether or not anybody reads this
                print(f"{plan.run_dir}: {len(pending)} of {len(plan.steps)} steps to do", flush=True)
            code = here.run(plan_file, experiment.cluster.ranks, lock)
            if code:
                return code
        else:
            print(f"{plan.run_dir}: all {len(plan.steps)} steps are done; nothing to run", flush=True)
        run_folder.publish(plan)
        report.show(run_folder)
    return 0


def _is_one_rank() -> bool:
    """Whether torchrun or srun started this command once for each rank."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _run_as_rank(plan: Plan) -> int:
    """Be one rank of those that torchrun or srun started with this command, perhaps on several machines."""
    run_folder = RunFolder(plan.run_dir)
    is_main = os.environ["RANK"] == "0"
    with run_folder.exclusive() if is_main else nullcontext():
        if is_main:
            run_folder.write_plan(plan)
        context = worker.join()
        code = worker.run_all(plan, [step.id for step in plan.pending()], context)
        if is_main and code == 0:
            run_folder.publish(plan)
            report.show(run_folder)
        if is_main and code == worker.STOPPED and ALLOCATION in os.environ:
            stage_job.come_back(plan, next(plan.pending()).id, None)
        worker.leave(code, context)


def describe(plan: Plan) -> str:
    """The plan as text: one line a step, with its state."""
    pending = {step.id for step in plan.pending()}
    width = max(len(id) for id in plan.steps)
    lines = [f"{plan.run_dir}: {len(plan.steps)} steps, {len(pending)} to do"]
    for step in plan.steps.values():
        state = "to do" if step.id in pending else "done "
        lines.append(f"  {state}  {step.id:<{width}}  {step.users}")
    return "\n".join(lines)
