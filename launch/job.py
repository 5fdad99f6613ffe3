"""What a scheduler runs: one step of a plan, on as many tasks as the job has, each a rank."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


@dataclass(frozen=True)
class StageJob:
    """A picklable callable for submitit. It holds no state of its own: whatever was done lies in the step's folder.

    `part` is (index, number of parts) for a worker of an array that shares one subtraction, else None.
    """

    plan: Path
    step: str
    part: tuple[int, int] | None = None

    def __call__(self) -> NoReturn:
        """Run the step as this task's rank, and end the process with its exit code."""
        _export_ranks()
        from launch import worker

        plan = worker.read(self.plan)
        context = worker.join()
        if self.part is not None:
            context.part = self.part
        code = worker.run_all(plan, [self.step], context)
        worker.leave(_after(code, context), context)


def _export_ranks() -> None:
    """torch's env:// variables from the scheduler's. Nothing else tells DeepSpeed its rank: no ssh, hostfile or mpi4py.

    CUDA_VISIBLE_DEVICES stays as it is: a rank takes the GPU of its local rank, or the only one it can see.
    """
    import submitit

    environment = submitit.JobEnvironment()
    os.environ["RANK"] = str(environment.global_rank)
    os.environ["WORLD_SIZE"] = str(environment.num_tasks)
    os.environ["LOCAL_RANK"] = str(environment.local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(environment.num_tasks // environment.num_nodes)
    os.environ["MASTER_ADDR"] = environment.hostnames[0] if environment.num_nodes > 1 else "127.0.0.1"
    os.environ["MASTER_PORT"] = str(_port(environment.job_id, environment.num_tasks))
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _port(job_id: str, num_tasks: int) -> int:
    """A port that all tasks agree on, below the ephemeral range (32768 and up); any free one for a single task."""
    if num_tasks == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port
    return 20000 + int("".join(filter(str.isdigit, job_id))) % 12000


def _after(code: int, context: object) -> int:
    """The exit code that the scheduler sees.

    A job that was warned of its time limit has saved and asks for another turn under its own id, so that whatever
    depends on it keeps waiting. A job that was told to end (SIGTERM: cancelled, or preempted and queued again by SLURM
    itself) must not ask: a cancelled job would come back.
    """
    from launch.outcome import STOPPED
    from pipeline.context import Context, Stop, log

    assert isinstance(context, Context)
    job_id = os.environ.get("SLURM_JOB_ID")
    if code == STOPPED and context.stop is Stop.COME_BACK and job_id and context.is_main:
        log.info("saved; job %s is queued again", job_id)
        subprocess.run(["scontrol", "requeue", job_id], check=True)
    return code
