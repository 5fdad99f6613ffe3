"""What a cluster's nodes see and do: a small job, shaped like a fine-tuning's, whose ranks leave reports.

`flearn doctor --on slurm` submits it; `launch/doctor/cluster_check.py` judges the reports.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from launch import worker
from launch.doctor import machine
from launch.doctor.capacity import measure_flops
from launch.slurm import chain, place, scheduler
from launch.slurm.scheduler import JobState
from launch.slurm.site import Site
from launch.slurm.stage_job import export_ranks
from pipeline.artifact import write_json
from pipeline.config import Cluster
from pipeline.context import Context
from pipeline.errors import InputError

_MINUTES = 10
"""The job's time limit; it ends by itself within seconds of its start."""
_SECONDS_FOR_SIGNAL = 30
_SECONDS_FOR_FILES = 10
"""How long a shared folder may take to show what another node wrote."""
_SECONDS_TO_JOIN = 240
_POLL_SECONDS = 0.5


@dataclass
class Report:
    """One rank's findings; what is below `joined` is known once the ranks have found each other."""

    rank: int
    host: str
    num_cores: int
    host_bytes: int
    """Memory that the job may use on this node."""
    disk_bytes: int
    """Free where runs are kept."""
    missing: list[str]
    """Those of the config's files that this node does not see."""
    versions: dict[str, str | None]
    gpus: list[str]
    gpu_bytes: list[int]
    driver: str | None
    nccl: str | None
    joined: bool = False
    device: str = "cpu"
    num_seen: int = 0
    """Reports of ranks, itself included, that this one finds in the shared folder."""
    flops: dict[str, float] | None = None
    """Rank 0 only: floating-point operations a second of its device, as `measure_flops` has them."""
    signalled: bool = False
    """Whether SIGUSR2, sent to the job, reached this rank's Python."""


@dataclass(frozen=True)
class Probe:
    """A picklable callable for submitit: look around, join the other ranks, wait for a signal.

    Each rank writes its report to `folder` three times, with what it knows by then: of one that hangs or dies
    in between the last report tells how far it came.
    """

    folder: Path
    inputs: tuple[Path, ...]

    def __call__(self) -> NoReturn:
        """Be one rank of the probe, and end the process."""
        export_ranks()
        report = look(int(os.environ["RANK"]), self.folder, self.inputs)
        self._leave(report)
        context = worker.join()
        _measure(report, context)
        context.barrier()
        report.num_seen = _wait_for_reports(self.folder, context.world_size)
        self._leave(report)
        deadline = time.monotonic() + _SECONDS_FOR_SIGNAL
        while not context.stop and time.monotonic() < deadline:
            time.sleep(0.1)
        report.signalled = context.stop
        self._leave(report)
        worker.leave(0, context)

    def _leave(self, report: Report) -> None:
        write_json(self.folder / f"rank{report.rank}.json", dataclasses.asdict(report))


def look(rank: int, folder: Path, inputs: tuple[Path, ...]) -> Report:
    """What can be seen from here without the other ranks."""
    devices = machine.find_devices()
    return Report(
        rank=rank,
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        num_cores=len(os.sched_getaffinity(0)),
        host_bytes=_host_bytes(),
        disk_bytes=shutil.disk_usage(folder).free,
        missing=[str(path) for path in inputs if not path.exists()],
        versions=machine.versions(),
        gpus=devices.names,
        gpu_bytes=devices.memory_bytes,
        driver=machine.driver_version(),
        nccl=machine.nccl_version(),
    )


def _host_bytes() -> int:
    """Free memory, or the job's share of the node's, if that is less."""
    per_node, per_cpu, cpus = (
        int(os.environ.get(name, 0))
        for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")
    )
    mebibytes = per_node or per_cpu * cpus
    free = machine.host_memory_bytes()
    return min(free, mebibytes << 20) if mebibytes else free


def _measure(report: Report, context: Context) -> None:
    """Whether the ranks' devices can add up ones (over NCCL, if GPUs), and how fast rank 0's is."""
    import torch
    import torch.distributed as dist

    ones = torch.ones(1, device=context.device)
    dist.all_reduce(ones)
    report.joined = int(ones.item()) == context.world_size
    report.device = context.device
    if context.is_main:
        report.flops = measure_flops()


def _wait_for_reports(folder: Path, wanted: int) -> int:
    deadline = time.monotonic() + _SECONDS_FOR_FILES
    while (found := len(list(folder.glob("rank*.json")))) < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


@dataclass
class Probed:
    """A probe that has ended: what its ranks reported, and how its job did."""

    cluster: Cluster
    site: Site
    folder: Path
    job: str = ""
    state: str = ""
    """The job's last state, in SLURM's word."""
    reports: list[Report] = field(default_factory=list)

    @property
    def hosts(self) -> str:
        return ", ".join(dict.fromkeys(report.host for report in self.reports))


@contextmanager
def run(cluster: Cluster, site: Site, inputs: tuple[Path, ...]) -> Iterator[Probed]:
    """Submit the probe, wait for its end, and yield what was found.

    Its folder is then deleted, unless the job failed. Raises InputError if SLURM refuses the job, or there is
    no folder to write in. An interruption cancels the job, and leaves nothing.
    """
    runs_dir = Path(cluster.runs_dir).expanduser().absolute()
    folder = runs_dir / f".doctor-{os.uname().nodename}-{os.getpid()}"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        message = f"cannot write in {runs_dir} ({error.strerror}): set cluster.runs_dir to a folder of yours"
        raise InputError(message) from None
    probed, failed = Probed(cluster, site, folder), False
    try:
        shape = place.parameters("ranks", cluster, site) | {"time": _MINUTES}
        executor = chain.executor(folder, site, job_name="flearn:doctor", **shape)
        with chain.own_environment(), chain.refusals("the probe"):
            probed.job = executor.submit(Probe(folder, inputs)).job_id
        _follow(probed)
        failed = probed.state != "COMPLETED"
        yield probed
    finally:
        if probed.job:
            _end(probed.job)
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made[1:]:
                with suppress(OSError):  # somebody else's runs are in it by now
                    parent.rmdir()


def _end(job: str) -> None:
    """Cancel the job, and give it a moment to end: a task that still runs may write into its folder."""
    scheduler.cancel([job])
    deadline = time.monotonic() + _SECONDS_FOR_FILES
    while scheduler.states([job]).get(job, JobState("COMPLETED")).is_active and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _follow(probed: Probed) -> None:
    """Wait for the job's end. Once all ranks have found each other it is sent the signal that ends it.

    Gives up when the job has run for so long that its ranks will not find each other any more.
    """
    told, was_signalled, started = "", False, 0.0
    while True:
        state = scheduler.states([probed.job]).get(probed.job, JobState("COMPLETED"))
        probed.state, probed.reports = state.state, _read(probed.folder)
        if not state.is_active:
            break
        if state.state == "PENDING" and state.reason not in (told, "None"):
            told = state.reason
            print(f"flearn: job {probed.job} waits for its turn: {told}", file=sys.stderr, flush=True)
        have_met = [report.num_seen > 0 for report in probed.reports]
        if len(have_met) == probed.cluster.ranks and all(have_met) and not was_signalled:
            was_signalled = scheduler.signal(probed.job)
        if state.state == "RUNNING":
            started = started or time.monotonic()
            if time.monotonic() - started > _SECONDS_TO_JOIN:
                break
        time.sleep(_POLL_SECONDS)
    if probed.state == "COMPLETED":
        _await_last_reports(probed)


def _await_last_reports(probed: Probed) -> None:
    """A shared folder may show the ranks' last reports some seconds after the job has ended."""
    deadline = time.monotonic() + _SECONDS_FOR_FILES
    while not all(report.signalled for report in probed.reports) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        probed.reports = _read(probed.folder)


def _read(folder: Path) -> list[Report]:
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("rank*.json")]
    reports: list[Any] = [Report(**json.loads(text)) for text in texts]
    return sorted(reports, key=lambda report: report.rank)
