"""Submit an experiment's stages as jobs, through submitit: a chain on SLURM, or one after another on this machine.

from launch import submit
run = submit("configs/quickstart.yaml", ["forget.scale=0.5"], on="slurm")
print(run.run_dir, run.jobs)    # {"teach-...": "1234", ...}; then: flearn status RUN_DIR
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch import place, scheduler
from launch.job import StageJob
from launch.site import Site, load_site
from pipeline import config, stages
from pipeline.artifact import write_json
from pipeline.config import Experiment
from pipeline.errors import InputError
from pipeline.stages import Plan, Step

JOBS = "jobs.json"
LOGS = "jobs"


@dataclass(frozen=True)
class Submitted:
    """A run whose stages are in the queue: its folder, and the job id of each step that was not yet done."""

    run_dir: Path
    jobs: dict[str, str]


def submit(path: str | Path, overrides: Sequence[str] = (), on: Literal["local", "slurm"] = "slurm") -> Submitted:
    """Submit what is not yet done of the experiment at `path`. On `local` this returns when all is done.

    Raises InputError for a mistake in the config or a submission that SLURM refuses; nothing is then left in the queue.
    """
    experiment = config.load(Path(path), list(overrides))
    plan = stages.plan(experiment)
    plan_path = write_plan(plan)
    jobs = _submit_chain(plan, plan_path, experiment) if on == "slurm" else _run_here(plan, plan_path, experiment)
    return Submitted(plan.run_dir, jobs)


def write_plan(plan: Plan) -> Path:
    """Write the plan under a name of its own, since jobs of another plan of this run may still wait; returns its path."""
    last = next(reversed(plan.steps.values()))
    path = plan.run_dir / f"plan-{last.fingerprint}.json"
    write_json(path, plan.to_json())
    write_json(plan.run_dir / "plan.json", plan.to_json())
    return path


def scripts(experiment: Experiment, plan: Plan) -> Iterator[tuple[Step, str]]:
    """The sbatch script of each step to do, as it would be submitted."""
    site = load_site(experiment.cluster.site)
    for step in plan.pending():
        executor = _executor(plan, step, experiment, site, [f"<{source.id}>" for source in _waits_for(plan, step)])
        yield step, executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def _submit_chain(plan: Plan, plan_path: Path, experiment: Experiment) -> dict[str, str]:
    site = load_site(experiment.cluster.site)
    known = read_jobs(plan.run_dir)
    active = {step for step, job in known.items() if scheduler.states(known.values()).get(job) in scheduler.ACTIVE} if known else set()
    submitted: dict[str, str] = {}
    try:
        for step in plan.pending():
            if step.id in active:
                continue  # another plan of this run has it in the queue
            waits = [known[source.id] for source in _waits_for(plan, step) if source.id in known]
            submitted[step.id] = known[step.id] = _submit(plan, plan_path, step, experiment, site, waits)
    except BaseException:
        scheduler.cancel(submitted.values())
        raise
    write_json(plan.run_dir / JOBS, known)
    return {step.id: known[step.id] for step in plan.pending()}


def read_jobs(run_dir: Path) -> dict[str, str]:
    """The job id of each step of the run that was ever submitted."""
    path = run_dir / JOBS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _waits_for(plan: Plan, step: Step) -> list[Step]:
    return [source for source in step.inputs.values() if not plan.artifact(source).is_complete]


def _submit(plan: Plan, plan_path: Path, step: Step, experiment: Experiment, site: Site, waits: list[str]) -> str:
    executor = _executor(plan, step, experiment, site, waits)
    num_parts = experiment.cluster.forget_parts if place.SHAPES[step.stage] == "parts" else 1
    parts = [(i, num_parts) for i in range(num_parts)] if num_parts > 1 else [None]
    with _own_environment(), _refusals(step):
        jobs = executor.submit_array([StageJob(plan_path, step.id, part) for part in parts])
    return str(jobs[0].job_id).split("_")[0]


def _executor(plan: Plan, step: Step, experiment: Experiment, site: Site, waits: list[str]) -> Any:
    import submitit

    try:
        executor = submitit.SlurmExecutor(folder=plan.run_dir / LOGS / "%j", python=site.python)
    except RuntimeError:
        raise InputError("no srun here: submit from a login node of a SLURM cluster, or use --on here") from None
    found = place.parameters(step.stage, experiment.cluster, site)
    further = found["slurm_additional_parameters"]
    if waits:
        further["dependency"] = "afterok:" + ":".join(sorted(set(waits)))
        if site.kill_on_invalid_dependency:
            further["kill-on-invalid-dep"] = "yes"
    executor.update_parameters(job_name=f"{experiment.name}:{step.stage}", **{k.removeprefix("slurm_"): v for k, v in found.items()})
    return executor


@contextmanager
def _own_environment() -> Iterator[None]:
    """Without the variables of the job we may be inside of, which sbatch would take for options; SLURM_CONF stays."""
    saved = dict(os.environ)
    for name in saved:
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name != "SLURM_CONF":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(saved)


@contextmanager
def _refusals(step: Step) -> Iterator[None]:
    """sbatch's own words, as one line."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        yield
    except (FailedJobError, FailedSubmissionError) as error:
        raise InputError(f"SLURM refused the job of {step.id}: {' '.join(str(error).split())}") from None


def _run_here(plan: Plan, plan_path: Path, experiment: Experiment) -> dict[str, str]:
    """The same jobs through submitit's local executor, one after another."""
    import submitit

    jobs: dict[str, str] = {}
    for step in plan.pending():
        executor = submitit.LocalExecutor(folder=plan.run_dir / LOGS / "%j")
        tasks = experiment.cluster.ranks if place.SHAPES[step.stage] == "ranks" else 1
        executor.update_parameters(tasks_per_node=tasks, timeout_min=60 * 24 * 30)
        job = executor.submit(StageJob(plan_path, step.id))
        jobs[step.id] = str(job.job_id)
        job.wait()
        if not plan.artifact(step).is_complete:
            raise InputError(f"{step.id} failed: see flearn status {plan.run_dir} and {job.paths.stderr}")
    return jobs
