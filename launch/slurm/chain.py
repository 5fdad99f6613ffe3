"""Submit an experiment's stages as jobs, through submitit: a chain on SLURM, or one after another on this
machine.

from launch import submit
run = submit("configs/quickstart.yaml", ["forget.scale=0.5"], on="slurm")
print(run.run_dir, run.jobs)    # {"teach-...": "1234", ...}; then: flearn status RUN_DIR
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from launch.commands.run import PLAN, exclusive
from launch.outcome import ERRORS
from launch.slurm import place, scheduler
from launch.slurm.job import StageJob
from launch.slurm.site import Site, load_site
from pipeline import config
from pipeline.artifact import write_json
from pipeline.config import Experiment
from pipeline.delta.parts import missing_parts
from pipeline.errors import InputError
from pipeline.plan import Plan, Step, make_plan
from pipeline.stages import STAGES

JOBS = "jobs.json"
LOGS = "jobs"
ATTEMPT = "flearn: attempt "
"""Begins the first line of each attempt at a job in its standard error, which holds what the attempts before
it wrote, too.
"""
_LOCAL = "local:"
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
    with exclusive(plan.run_dir, _SECONDS_FOR_OTHERS if on == "slurm" else 0):
        plan_path = write_plan(plan)
        jobs = (
            _Chain(plan, plan_path, experiment).submit()
            if on == "slurm"
            else _run_here(plan, plan_path, experiment)
        )
    return Submitted(plan.run_dir, jobs)


def write_plan(plan: Plan) -> Path:
    """Write the plan under a name of its own, since jobs of another plan of this run may still wait; returns
    its path.
    """
    path = plan.run_dir / f"plan-{plan.report.fingerprint}.json"
    for target in (path, plan.run_dir / PLAN):
        write_json(target, plan.to_json())
    return path


def read_jobs(run_dir: Path) -> dict[str, str]:
    """The job id of each step of the run that was ever submitted."""
    path = run_dir / JOBS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def job_files(run_dir: Path, job: str | None, kind: Literal["out", "err"]) -> list[Path]:
    """What the tasks of a job (all of them, of an array) wrote, in their order; nothing for no job."""
    if job is None:
        return []
    number = job.removeprefix(_LOCAL)
    return sorted(
        [*(run_dir / LOGS).glob(f"{number}_[0-9]*_log.{kind}")],
        key=lambda path: [int(n) for n in path.name.split("_")[:-1]],
    )


def scripts(experiment: Experiment, plan: Plan) -> Iterator[tuple[Step, str]]:
    """The sbatch script of each step to do, as it would be submitted; a step to wait for stands for its job's
    id.
    """
    chain = _Chain(plan, plan.run_dir / PLAN, experiment)
    chain.jobs = {step.id: f"<{step.id}>" for step in plan.pending()}
    for step in plan.pending():
        yield step, script(chain.executor(step), len(chain.calls(step)))


class _Chain:
    """The jobs of a plan's pending steps, each waiting for the jobs of its inputs."""

    def __init__(self, plan: Plan, plan_path: Path, experiment: Experiment) -> None:
        self.plan = plan
        self.plan_path = plan_path
        self.experiment = experiment
        self.site: Site = load_site(experiment.cluster.site)
        self.jobs: dict[str, str] = {}
        """By step, the jobs of this plan that can still end well."""

    def submit(self) -> dict[str, str]:
        known = read_jobs(self.plan.run_dir)
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
        write_json(self.plan.run_dir / JOBS, known | submitted)
        return self.jobs

    def _submit(self, step: Step) -> str:
        executor = self.executor(step)
        for error in self.plan.artifact(step).folder.glob(ERRORS):
            error.unlink(missing_ok=True)  # of an earlier job
        with own_environment(), refusals(step.id), executor.batch():
            jobs = [executor.submit(call) for call in self.calls(step)]
        return str(jobs[0].job_id).split("_")[0]

    def calls(self, step: Step) -> list[StageJob]:
        """What to run of a step: one job, or one for each part that is missing."""
        if STAGES[step.stage].job != "parts" or self.experiment.cluster.forget_parts == 1:
            return [StageJob(self.plan_path, step.id)]
        parts = missing_parts(self.plan.artifact(step).folder, self.experiment.cluster.forget_parts)
        return [StageJob(self.plan_path, step.id, part) for part in parts]

    def executor(self, step: Step) -> Any:
        parameters = place.parameters(STAGES[step.stage].job, self.experiment.cluster, self.site)
        mark = f'echo "{ATTEMPT}$((${{SLURM_RESTART_COUNT:-0}} + 1)) on $SLURM_JOB_NODELIST" >&2'
        parameters["setup"] = [mark, *parameters.get("setup", [])]
        waits = sorted({self.jobs[source.id] for source in step.inputs.values() if source.id in self.jobs})
        if waits:
            parameters["dependency"] = "afterok:" + ":".join(waits)
            if self.site.kill_on_invalid_dependency:
                parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
        return executor(
            self.plan.run_dir / LOGS, self.site, job_name=f"{self.experiment.name}:{step.stage}", **parameters
        )


def executor(folder: Path, site: Site, **parameters: Any) -> Any:
    """submitit's executor for jobs of one shape (`place.parameters`); `folder` takes their scripts and what
    they print.
    """
    import submitit

    try:
        made = submitit.SlurmExecutor(folder=folder, python=site.python)
    except RuntimeError:
        raise InputError(
            "no srun here: submit from a login node of a SLURM cluster, or use --on here"
        ) from None
    made.update_parameters(**parameters)
    return made


def script(executor: Any, num_jobs: int = 1) -> str:
    """The sbatch script that `executor` would submit, for one job or an array."""
    if num_jobs > 1:
        executor.parameters["map_count"] = num_jobs
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    return text


def _settled(jobs: dict[str, str]) -> dict[str, scheduler.JobState]:
    """By step, its job's state, once no job is on its way out any more: one such may end well, badly, or come
    again.
    """
    deadline = time.monotonic() + _SECONDS_FOR_OTHERS
    while True:
        found = scheduler.states(jobs.values())
        if time.monotonic() > deadline or not any(job.state == "COMPLETING" for job in found.values()):
            return {step: found[job] for step, job in jobs.items() if job in found}
        time.sleep(0.3)


@contextmanager
def own_environment() -> Iterator[None]:
    """Without the variables of the job we may be inside of, which sbatch would take for options; SLURM_CONF
    stays.
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
    """sbatch's own words, as one line."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with redirect_stderr(StringIO()):  # submitit prints them too
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line.strip() for line in str(error).splitlines() if "error:" in line]
        raise InputError(
            f"SLURM refused the job of {of}: {'; '.join(said) or ' '.join(str(error).split())}"
        ) from None


def _run_here(plan: Plan, plan_path: Path, experiment: Experiment) -> dict[str, str]:
    """The same jobs through submitit's local executor, one after another."""
    import submitit

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs: dict[str, str] = {}
    for step in plan.pending():
        executor = submitit.LocalExecutor(folder=plan.run_dir / LOGS)
        tasks = experiment.cluster.ranks if STAGES[step.stage].job == "ranks" else 1
        executor.update_parameters(tasks_per_node=tasks, timeout_min=60 * 24 * 30)
        job = executor.submit(StageJob(plan_path, step.id))
        jobs[step.id] = f"{_LOCAL}{job.job_id}"
        write_json(plan.run_dir / JOBS, read_jobs(plan.run_dir) | jobs)
        print(f"  job {job.job_id:<10} {step.id}", flush=True)
        try:
            job.wait()
        except BaseException:
            job.cancel()
            raise
        if not plan.artifact(step).is_complete:
            raise InputError(f"{step.id} failed: see flearn status {plan.run_dir} and {job.paths.stderr}")
    return jobs
