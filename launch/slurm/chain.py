"""Submit an experiment's stages as jobs, through submitit: a chain on SLURM, or one after another here.

from launch import submit
run = submit("configs/quickstart.yaml", ["forget.scale=0.5"], on="slurm")
print(run.run_dir, run.jobs)    # {"teach-...": "1234", ...}; then: flearn status RUN_DIR
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from launch.run_folder import LOCAL, RunFolder
from launch.slurm import place, scheduler
from launch.slurm.site import Site, load_site
from launch.slurm.stage_job import StageJob
from pipeline import config
from pipeline.config import Experiment
from pipeline.errors import InputError
from pipeline.plan import Plan, Step, make_plan
from pipeline.stages import STAGES
from pipeline.weights.journal import missing_parts

ATTEMPT = "flearn: attempt "
"""Begins the first line of each attempt at a job in its standard error: SLURM appends a new attempt there."""
_SECONDS_FOR_OTHERS = 60
"""How long to wait for another submission to this run, and for jobs that are just ending."""


@dataclass(frozen=True)
class Submitted:
    """A run whose stages are in the queue: its folder, and the job id of each step that was not yet done."""

    run_dir: Path
    jobs: dict[str, str]


def submit(
    path: str | Path, overrides: Sequence[str] = (), on: Literal["local", "slurm"] = "slurm"
) -> Submitted:
    """Submit what is not yet done of the experiment at `path`. On `local` this returns when all is done.

    A step that another submission to the same run has in the queue is waited for, not submitted twice. Raises
    InputError for a mistake in the config or a submission that SLURM refuses; nothing is then left in the
    queue.
    """
    experiment = config.load(Path(path), list(overrides))
    plan = make_plan(experiment)
    if on == "slurm" and any(plan.pending()):
        scheduler.require_controller()
    run_folder = RunFolder(plan.run_dir)
    with run_folder.exclusive(_SECONDS_FOR_OTHERS if on == "slurm" else 0):
        plan_file = run_folder.submit_plan(plan)
        if on == "slurm":
            return Submitted(plan.run_dir, _Chain(plan, plan_file, experiment).submit())
        return Submitted(plan.run_dir, _run_here(plan, plan_file, experiment))


def scripts(experiment: Experiment, plan: Plan) -> Iterator[tuple[Step, str]]:
    """The sbatch script of each step to do, as it would be submitted.

    A step to wait for has no job id yet: `<its id>` stands for it.
    """
    chain = _Chain(plan, RunFolder(plan.run_dir).plan_file, experiment)
    chain.jobs = {step.id: f"<{step.id}>" for step in plan.pending()}
    for step in plan.pending():
        yield step, script(chain.executor(step), len(chain.calls(step)))


class _Chain:
    """The jobs of a plan's pending steps, each waiting for the jobs of its inputs."""

    def __init__(self, plan: Plan, plan_file: Path, experiment: Experiment) -> None:
        self.plan = plan
        self.plan_file = plan_file
        self.experiment = experiment
        self.run_folder = RunFolder(plan.run_dir)
        self.site: Site = load_site(experiment.cluster.site)
        self.jobs: dict[str, str] = {}
        """By step, the jobs of this plan that can still end well."""

    def submit(self) -> dict[str, str]:
        """Submit the pending steps that no live job works on; all or nothing. Returns the jobs by step."""
        known = self.run_folder.jobs()
        pending = list(self.plan.pending())
        found = _settled({step.id: known[step.id] for step in pending if step.id in known})
        submitted: dict[str, str] = {}
        try:
            for step in pending:
                if step.id in found and found[step.id].is_active:
                    if not any(source.id in submitted for source in step.inputs.values()):
                        self.jobs[step.id] = known[step.id]
                        continue
                    scheduler.cancel([known[step.id]])  # it waits for a job that failed
                submitted[step.id] = self.jobs[step.id] = self._submit(step)
        except BaseException:
            scheduler.cancel(submitted.values())
            raise
        self.run_folder.add_jobs(submitted)
        return self.jobs

    def _submit(self, step: Step) -> str:
        executor = self.executor(step)
        self.run_folder.step(step.id).clear_errors()
        with own_environment(), refusals(step.id), executor.batch():
            jobs = [executor.submit(call) for call in self.calls(step)]
        return str(jobs[0].job_id).split("_")[0]  # <job>_<index> in an array: its jobs share the number

    def calls(self, step: Step) -> list[StageJob]:
        """What to run of a step: one job, or one for each part that is missing."""
        num_parts = self.experiment.cluster.forget_parts
        if STAGES[step.stage].job != "parts" or num_parts == 1:
            return [StageJob(self.plan_file, step.id)]
        parts = missing_parts(self.plan.artifact(step).folder, num_parts)
        return [StageJob(self.plan_file, step.id, part) for part in parts]

    def executor(self, step: Step) -> Any:
        """submitit's executor for the step's job, which waits for the jobs of its inputs."""
        parameters = place.parameters(STAGES[step.stage].job, self.experiment.cluster, self.site)
        mark = f'echo "{ATTEMPT}$((${{SLURM_RESTART_COUNT:-0}} + 1)) on $SLURM_JOB_NODELIST" >&2'
        parameters["setup"] = [mark, *parameters.get("setup", [])]
        waits = sorted({self.jobs[source.id] for source in step.inputs.values() if source.id in self.jobs})
        if waits:
            parameters["dependency"] = "afterok:" + ":".join(waits)
            if self.site.kill_on_invalid_dependency:
                parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
        parameters["job_name"] = f"{self.experiment.name}:{step.stage}"
        return executor(self.run_folder.jobs_folder, self.site, **parameters)


def executor(folder: Path, site: Site, **parameters: Any) -> Any:
    """submitit's executor for jobs of one shape (`place.parameters`).

    Their scripts, and what they print, go to `folder`.
    """
    import submitit

    try:
        made = submitit.SlurmExecutor(folder=folder, python=site.python)
    except RuntimeError:
        message = "no srun here: submit from a login node of a SLURM cluster, or use --on here"
        raise InputError(message) from None
    made.update_parameters(**parameters)
    return made


def script(executor: Any, num_jobs: int = 1) -> str:
    """The sbatch script that `executor` would submit, for one job or an array."""
    if num_jobs > 1:
        executor.parameters["map_count"] = num_jobs
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    return text


def _settled(jobs: dict[str, str]) -> dict[str, scheduler.JobState]:
    """By step, its job's state, once no job is COMPLETING: such a job may end well, badly, or be requeued."""
    deadline = time.monotonic() + _SECONDS_FOR_OTHERS
    while True:
        found = scheduler.states(jobs.values())
        if time.monotonic() > deadline or not any(job.state == "COMPLETING" for job in found.values()):
            return {step: found[job] for step, job in jobs.items() if job in found}
        time.sleep(0.3)


@contextmanager
def own_environment() -> Iterator[None]:
    """Without the variables of the job we may be inside of, which sbatch would take for options.

    SLURM_CONF stays: it says where the controller is.
    """
    saved = dict(os.environ)
    for name in saved:
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name != "SLURM_CONF":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(saved)


@contextmanager
def refusals(of: str) -> Iterator[None]:
    """Raises InputError with sbatch's own words, as one line, where it refuses the job of `of`."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with redirect_stderr(StringIO()):  # submitit prints them too
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        errors = [line.strip() for line in str(error).splitlines() if "error:" in line]
        said = "; ".join(errors) or " ".join(str(error).split())
        raise InputError(f"SLURM refused the job of {of}: {said}") from None


def _run_here(plan: Plan, plan_file: Path, experiment: Experiment) -> dict[str, str]:
    """The same jobs through submitit's local executor, one after another."""
    import submitit

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_folder = RunFolder(plan.run_dir)
    jobs: dict[str, str] = {}
    for step in plan.pending():
        executor = submitit.LocalExecutor(folder=run_folder.jobs_folder)
        tasks = experiment.cluster.ranks if STAGES[step.stage].job == "ranks" else 1
        executor.update_parameters(tasks_per_node=tasks, timeout_min=60 * 24 * 30)
        job = executor.submit(StageJob(plan_file, step.id))
        jobs[step.id] = f"{LOCAL}{job.job_id}"
        run_folder.add_jobs(jobs)
        print(f"  job {job.job_id:<10} {step.id}", flush=True)
        try:
            job.wait()
        except BaseException:
            job.cancel()
            raise
        if not plan.artifact(step).is_complete:
            raise InputError(f"{step.id} failed: see flearn status {plan.run_dir} and {job.paths.stderr}")
    return jobs
