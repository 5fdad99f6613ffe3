"""From the shape of a stage's job to a scheduler's resources, in submitit's parameters."""

from __future__ import annotations

from typing import Any

from launch.slurm.site import Site
from pipeline.config import Cluster
from pipeline.errors import InputError
from pipeline.stages import JobShape


def parameters(shape: JobShape, cluster: Cluster, site: Site) -> dict[str, Any]:
    """Parameters of submitit's SlurmExecutor for a job of that shape."""
    nodes, tasks = (cluster.nodes, cluster.ranks // cluster.nodes) if shape == "ranks" else (1, 1)
    is_for_gpus = shape in ("ranks", "gpu")
    gpus = _gpus(site, tasks) if is_for_gpus and site.gpus is not None else {}
    found: dict[str, Any] = {
        "nodes": nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": site.cpus_per_rank,
        "time": site.minutes,
        "signal_delay_s": site.warning_seconds,
        "partition": site.partition if is_for_gpus else site.cpu_partition or site.partition,
        "account": site.account,
        "qos": site.qos,
        "mem": _memory(site, tasks),
        "setup": site.setup or None,
        # srun of 22.05 and later does not take over the job's --cpus-per-task. Without kill-on-bad-exit the
        # others would wait for a dead rank in a collective until the time limit.
        "srun_args": [f"--cpus-per-task={site.cpus_per_rank}", "--kill-on-bad-exit=1", *site.srun_args],
        "additional_parameters": {"requeue": True, **site.sbatch, **gpus},
    }
    return {name: value for name, value in found.items() if value is not None}


def _memory(site: Site, tasks: int) -> str | None:
    """Of a node, for its tasks."""
    if site.memory_per_rank is None:
        return None
    number = site.memory_per_rank.removesuffix("GB")
    if not number.isdecimal():
        raise InputError(f"memory_per_rank: {site.memory_per_rank}: expected whole gigabytes, such as 60GB")
    return f"{int(number) * tasks}GB"


def _gpus(site: Site, tasks: int) -> dict[str, Any]:
    """One for each task, in the words of sbatch that this site understands."""
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    if site.gpus == "gres":
        return {"gres": f"gpu:{kind}{tasks}"}
    if site.gpus == "gpus-per-node":
        return {"gpus-per-node": f"{kind}{tasks}"}
    return {"gpus-per-task": f"{kind}1"}
