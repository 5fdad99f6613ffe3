"""What a SLURM cluster has and lacks, for `flearn doctor --on slurm`: a table of checks, most of them of a
probe job's reports.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from launch.doctor import machine, probe
from launch.doctor.capacity import Capacity
from launch.doctor.machine import Row
from launch.doctor.probe import Probed, Report
from launch.slurm import chain, place, scheduler
from launch.slurm.site import Site, load_site
from pipeline.config import Cluster
from pipeline.errors import InputError
from pipeline.stages import JobShape

_GIB = 1 << 30
_JOBS: dict[JobShape, str] = {
    "ranks": "fine-tuning",
    "gpu": "evaluation",
    "parts": "forgetting",
    "cpu": "report",
}
"""What jobs of each shape are called here."""


def rows(cluster: Cluster, inputs: tuple[Path, ...]) -> Generator[Row, None, Capacity | None]:
    """Every check, in the order they are shown; `inputs` are files that the nodes must see. Submits one small
    job.

    Returns what the nodes have, for a forecast, or None if that did not become known.
    """
    try:
        scheduler.require_controller()
    except InputError as error:
        yield Row(
            "SLURM",
            "fail",
            str(error),
            "start this on a login node; if it is one, the site's administrators know more",
        )
        return None
    site = load_site(cluster.site)
    yield from controller_rows(scheduler.settings())
    refused = False
    for row in job_rows(cluster, site):
        refused = refused or row.state == "fail"
        yield row
    if refused:
        return None
    with probe.run(cluster, site, inputs) as probed:
        yield from judge(probed)
        return capacity(probed)


def controller_rows(settings: dict[str, str]) -> Iterator[Row]:
    """What the controller's configuration means for a run."""
    yield Row(
        "SLURM", "ok", f"{settings.get('SLURM_VERSION', '?')}, cluster {settings.get('ClusterName', '?')}"
    )
    storage = settings.get("AccountingStorageType", "")
    if storage.endswith("/slurmdbd") and shutil.which("sacct"):
        yield Row("accounting", "ok", storage)
    else:
        kept = settings.get("MinJobAge", "minutes")
        advice = f"flearn status knows how a job ended for {kept} (MinJobAge); later its files alone tell"
        yield Row("accounting", "warn", f"none ({storage or 'unknown'})", advice)
    mode = settings.get("PreemptMode", "OFF")
    if "CANCEL" in mode:
        yield Row(
            "preemption",
            "warn",
            mode,
            "a preempted job is cancelled: run the same command again, and it goes on",
        )
    else:
        told = (
            ", after a job's own warning"
            if "preempt_send_user_signal" in settings.get("SlurmctldParameters", "")
            else ""
        )
        yield Row("preemption", "ok", "none" if mode == "OFF" else f"{mode}{told}")


def job_rows(cluster: Cluster, site: Site) -> Iterator[Row]:
    """Whether SLURM would take each shape of job that a run submits: partition, account, qos, nodes, GPUs,
    memory.
    """
    told = set()
    for job, name in _JOBS.items():
        parameters = place.parameters(job, cluster, site)
        parts = cluster.forget_parts if job == "parts" else 1
        executor = chain.executor(
            Path(cluster.runs_dir).expanduser().absolute(), site, job_name="flearn:doctor", **parameters
        )
        with chain.own_environment():
            objection = scheduler.objection(chain.script(executor, parts))
        shape = _shape(parameters, parts)
        if objection is None:
            yield Row(f"{name} jobs", "ok", f"{shape}: accepted")
        elif objection not in told:
            told.add(objection)
            file = (
                cluster.site or "the site file (a copy of slurm/sites/example.yaml, --set cluster.site=...)"
            )
            yield Row(
                f"{name} jobs",
                "fail",
                f"{shape}: {objection}",
                f"change {file}, or cluster.ranks and cluster.nodes",
            )


def _shape(parameters: dict[str, Any], parts: int) -> str:
    nodes, tasks = parameters["nodes"], parameters["ntasks_per_node"]
    each = f"{tasks} task{'s' * (tasks > 1)}" + (f" on each of {nodes} nodes" if nodes > 1 else "")
    return f"{each} in {parameters.get('partition', 'the default partition')}" + (
        f", {parts} such" if parts > 1 else ""
    )


def judge(probed: Probed) -> Iterator[Row]:
    """A finding for each check of the probe's reports."""
    row = _job(probed)
    yield row
    if row.state != "fail":
        for check in (_shared_folder, _inputs, _versions, _signals, _cores, _gpus):
            yield check(probed)


def capacity(probed: Probed) -> Capacity | None:
    """What a rank of this shape has; None unless every rank found the others."""
    measured = next((report for report in probed.reports if report.flops), None)
    if measured is None or measured.flops is None:
        return None
    gpu_bytes = [number for report in probed.reports for number in report.gpu_bytes]
    host_bytes = min(report.host_bytes for report in probed.reports)
    tasks = probed.cluster.ranks // probed.cluster.nodes
    # Tasks that SLURM does not bind to cores see those of the whole node, whose speed was then measured.
    share = 1.0 if gpu_bytes else min(1.0, probed.site.cpus_per_rank / measured.num_cores)
    return Capacity(
        device_bytes=min(gpu_bytes) if gpu_bytes else None,
        host_bytes=host_bytes,
        disk_bytes=min(report.disk_bytes for report in probed.reports),
        flops={precision: flops * share for precision, flops in measured.flops.items()},
        on_cluster=True,
        rank_bytes=host_bytes // tasks if probed.site.memory_per_rank is not None else None,
    )


def _job(probed: Probed) -> Row:
    reports, ranks = probed.reports, probed.cluster.ranks
    if len(reports) == ranks and all(report.joined for report in reports):
        over = "NCCL" if reports[0].device != "cpu" else "gloo, on CPUs"
        return Row(
            "probe job",
            "ok",
            f"job {probed.job}: {ranks} rank{'s' * (ranks > 1)} on {probed.hosts} joined over {over}",
        )
    detail = f"job {probed.job}: {probed.state}; {len(reports)} of {ranks} ranks started ({probed.hosts or 'none'})"
    detail += f"; it said: {said}" if (said := complaint(probed.folder)) else ""
    if len(reports) < ranks:
        advice = f"see {probed.folder}; a node that does not see this folder cannot start: set cluster.runs_dir to one that all nodes see"
    else:
        advice = "ranks need ports 20000-32000 between nodes; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network to use"
    return Row("probe job", "fail", detail, advice)


def complaint(folder: Path) -> str:
    """What the job's tasks wrote first about an error, else what srun did; empty for nothing."""
    lines = [
        line
        for path in sorted(folder.glob("*_log.err"))
        for line in path.read_text(errors="replace").splitlines()
        if line.strip()
    ]
    own = [
        line
        for line in lines
        if ("rror: " in line and not line.startswith("srun:") and "*** " not in line)
        or line.startswith("flearn:")
    ]
    return (own or lines or [""])[0].strip()[:200]


def _shared_folder(probed: Probed) -> Row:
    apart = [report for report in probed.reports if report.num_seen < probed.cluster.ranks]
    if apart:
        detail = f"{apart[0].host} does not see in {probed.folder.parent} what the others wrote there"
        return Row(
            "shared folder", "fail", detail, "set cluster.runs_dir to a folder that is the same on all nodes"
        )
    free = min(report.disk_bytes for report in probed.reports) / _GIB
    return Row(
        "shared folder", "ok", f"{probed.folder.parent} is the same on {probed.hosts}, {free:.1f} GiB free"
    )


def _inputs(probed: Probed) -> Row:
    lacking = [report for report in probed.reports if report.missing]
    if lacking:
        detail = f"{lacking[0].host} does not see {', '.join(lacking[0].missing)}"
        return Row("inputs", "fail", detail, "put the model and the facts into a folder that all nodes see")
    return Row("inputs", "ok", "the nodes see the config's files")


def _versions(probed: Probed) -> Row:
    here = machine.versions()
    there = [
        (name, version, report.host) for report in probed.reports for name, version in report.versions.items()
    ]
    absent = sorted({f"{name} on {host}" for name, version, host in there if version is None})
    if absent:
        return Row(
            "packages",
            "fail",
            f"not installed: {', '.join(absent)}",
            "install flearn for the site's `python`, or in its image",
        )
    differ = sorted(
        {
            f"{name} {version} on {host} (here: {here[name]})"
            for name, version, host in there
            if here[name] != version
        }
    )
    if differ:
        return Row(
            "packages",
            "warn",
            "; ".join(differ),
            "results of different versions may differ; all nodes should have the same",
        )
    return Row("packages", "ok", "the nodes' versions are those of this environment")


def _signals(probed: Probed) -> Row:
    deaf = [report for report in probed.reports if not report.signalled]
    if deaf:
        ranks = ", ".join(f"{report.rank} on {report.host}" for report in deaf)
        advice = "a job cannot save when told to: let the site's `python` or `setup` start it by exec; lower checkpoint_every_steps"
        return Row("signals", "fail", f"SIGUSR2 did not reach rank {ranks}", advice)
    return Row("signals", "ok", "SIGUSR2 reached every rank")


def _cores(probed: Probed) -> Row:
    wanted = probed.site.cpus_per_rank
    report = min(probed.reports, key=lambda report: report.num_cores)
    if report.num_cores < wanted:
        detail = (
            f"rank {report.rank} on {report.host} may use {report.num_cores} of the {wanted} cores asked for"
        )
        return Row(
            "cores", "warn", detail, "the site's srun_args: [--cpu-bind=none], or a smaller cpus_per_rank"
        )
    return Row(
        "cores",
        "ok",
        f"{wanted} a rank; {report.host_bytes / _GIB:.1f} GiB of memory for the job on each node",
    )


def _gpus(probed: Probed) -> Row:
    blind = [report for report in probed.reports if not report.gpus]
    if not blind:
        return _gpu_row(probed.reports)
    asked, driver = probed.site.gpus, blind[0].driver
    if asked is not None:
        detail = (
            f"asked for by {asked}, but torch sees none on {blind[0].host} (driver: {driver or 'not loaded'})"
        )
        return Row(
            "GPUs",
            "fail",
            detail,
            "install the torch build for the driver's CUDA version; a container needs its GPU flag (--nv)",
        )
    if driver is not None:
        return Row(
            "GPUs",
            "warn",
            f"{blind[0].host} has an NVIDIA driver ({driver}), but the job asks for no GPU",
            "site file: gpus",
        )
    return Row("GPUs", "ok", "none asked for: everything runs on the CPU")


def _gpu_row(reports: list[Report]) -> Row:
    first = reports[0]
    per_node = {
        report.host: max(len(one.gpus) for one in reports if one.host == report.host) for report in reports
    }
    found = ", ".join(f"{host}: {number} x {first.gpus[0]}" for host, number in per_node.items())
    detail = f"{found}, {min(min(one.gpu_bytes) for one in reports) / _GIB:.0f} GiB each, driver {first.driver}, NCCL {first.nccl}"
    if len({(report.driver, report.nccl, *report.gpus[:1]) for report in reports}) > 1:
        return Row(
            "GPUs",
            "warn",
            detail,
            "the nodes differ in GPU, driver or NCCL: name one kind in the site's gpu_type",
        )
    return Row("GPUs", "ok", detail)
