"""What a scheduler runs: one step of a plan, on as many tasks as the job has, each a rank."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launch.run_folder import RunFolder, StepFolder, read_plan
from launch.slurm import scheduler
from pipeline.plan import Plan


@dataclass(frozen=True)
class StageJob:
    """A picklable callable for submitit. Whatever was done lies in the step's folder, nothing in here.

    `plan` is a plan's file and `step` an id in it. `part` is (index, number of parts) for a worker of an
    array that shares one subtraction, else None.
    """

    plan: Path
    step: str
    part: tuple[int, int] | None = None

    def __call__(self) -> NoReturn:
        """Run the step as this task's rank, and end the process with its exit code."""
        export_ranks()
        # Not at the top: `python -m launch.worker` imports this file by way of the package `launch`, and
        # would then have two copies of the worker.
        from launch import worker

        context = worker.join(self.part)
        plan = read_plan(self.plan)
        code = worker.run_all(plan, [self.step], context)
        if context.is_main and code == 0:
            _publish(plan, self.step)
        if context.is_main and code == worker.STOPPED and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            come_back(plan, self.step, self.part)
        worker.leave(code, context)


def _publish(plan: Plan, step: str) -> None:
    """Copy a finished report to the top of the run's folder, if its plan was the last to be submitted."""
    run_folder = RunFolder(plan.run_dir)
    if step == plan.report.id and plan.artifact(plan.report).is_complete and step in run_folder.plan().steps:
        run_folder.publish(plan)


def export_ranks() -> None:
    """Set torch's env:// variables from the scheduler's.

    Nothing else tells DeepSpeed its rank: no ssh, hostfile or mpi4py. CUDA_VISIBLE_DEVICES stays as it is: a
    rank takes the GPU of its local rank, or the only one that it can see.
    """
    import submitit

    environment = submitit.JobEnvironment()
    os.environ["RANK"] = str(environment.global_rank)
    os.environ["WORLD_SIZE"] = str(environment.num_tasks)
    sees_one = os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0  # --gpus-per-task
    os.environ["LOCAL_RANK"] = "0" if sees_one else str(environment.local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(environment.num_tasks // environment.num_nodes)
    os.environ["MASTER_ADDR"] = environment.hostnames[0] if environment.num_nodes > 1 else "127.0.0.1"
    os.environ["MASTER_PORT"] = str(_port(environment.job_id, environment.num_tasks))
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _port(job_id: str, num_tasks: int) -> int:
    """A port that all tasks work out alike, below the ephemeral range (32768 and up).

    A single task takes any free one.
    """
    if num_tasks == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port
    return 20000 + int("".join(filter(str.isdigit, job_id))) % 12000


def come_back(plan: Plan, step: str, part: tuple[int, int] | None) -> None:
    """Ask SLURM for another turn under the same job id, after a time limit or a preemption.

    The other ranks wait for this, or their exit would be taken for the job's end. Where it cannot be had, the
    step has failed: `flearn status` says so, and what to do.
    """
    problem = scheduler.come_back()
    if problem is not None:
        print(f"flearn: {problem}", file=sys.stderr, flush=True)
        folder = StepFolder(plan.artifact(plan.steps[step]).folder)
        folder.path.mkdir(exist_ok=True)
        folder.note_error(part, 0, problem)
