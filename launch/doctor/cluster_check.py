"""What a SLURM cluster has and lacks: what SLURM says, and what a probe job's ranks report."""

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
    """Every check, in the order they are shown; submits one small job. `inputs` are files that the nodes must
    see.

    Returns what the nodes have, for a forecast, or None if that did not become known.
    """
    try:
        scheduler.require_controller()
    except InputError as error:
        advice = "start this on a login node; if it is one, the site's administrators know more"
        yield Row("SLURM", "fail", str(error), advice)
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
    version, name = settings.get("SLURM_VERSION", "?"), settings.get("ClusterName", "?")
    yield Row("SLURM", "ok", f"{version}, cluster {name}")
    storage = settings.get("AccountingStorageType", "")
    if storage.endswith("/slurmdbd") and shutil.which("sacct"):
        yield Row("accounting", "ok", storage)
    else:
        kept = settings.get("MinJobAge", "minutes")
        advice = f"flearn status knows how a job ended for {kept} (MinJobAge); later its files alone tell"
        yield Row("accounting", "warn", f"none ({storage or 'unknown'})", advice)
    mode = settings.get("PreemptMode", "OFF")
    if "CANCEL" in mode:
        advice = "a preempted job is cancelled: run the same command again, and it goes on"
        yield Row("preemption", "warn", mode, advice)
    elif mode == "OFF":
        yield Row("preemption", "ok", "none")
    else:
        warns = "preempt_send_user_signal" in settings.get("SlurmctldParameters", "")
        yield Row("preemption", "ok", f"{mode}, after a job's own warning" if warns else mode)


def job_rows(cluster: Cluster, site: Site) -> Iterator[Row]:
    """Whether SLURM would take each shape of job that a run submits: partition, account, qos, nodes, GPUs,
    memory. What is said of one shape is not said again of another.
    """
    told = set()
    file = cluster.site or "the site file (a copy of slurm/sites/example.yaml, --set cluster.site=...)"
    advice = f"change {file}, or cluster.ranks and cluster.nodes"
    runs_dir = Path(cluster.runs_dir).expanduser().absolute()
    for job, name in _JOBS.items():
        parameters = place.parameters(job, cluster, site)
        parts = cluster.forget_parts if job == "parts" else 1
        executor = chain.executor(runs_dir, site, job_name="flearn:doctor", **parameters)
        with chain.own_environment():
            objection = scheduler.objection(chain.script(executor, parts))
        shape = _shape(parameters, parts)
        if objection is None:
            yield Row(f"{name} jobs", "ok", f"{shape}: accepted")
        elif objection not in told:
            told.add(objection)
            yield Row(f"{name} jobs", "fail", f"{shape}: {objection}", advice)


def _shape(parameters: dict[str, Any], parts: int) -> str:
    nodes, tasks = parameters["nodes"], parameters["ntasks_per_node"]
    shape = f"{tasks} task{'s' * (tasks > 1)}"
    if nodes > 1:
        shape += f" on each of {nodes} nodes"
    shape += f" in {parameters.get('partition', 'the default partition')}"
    return shape + f", {parts} such" if parts > 1 else shape


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
        detail = f"job {probed.job}: {ranks} rank{'s' * (ranks > 1)} on {probed.hosts} joined over {over}"
        return Row("probe job", "ok", detail)
    detail = f"job {probed.job}: {probed.state};"
    detail += f" {len(reports)} of {ranks} ranks started ({probed.hosts or 'none'})"
    if said := complaint(probed.folder):
        detail += f"; it said: {said}"
    if len(reports) < ranks:
        advice = (
            f"see {probed.folder}; a node that does not see this folder cannot start:"
            " set cluster.runs_dir to one that all nodes see"
        )
    else:
        advice = (
            "ranks need ports 20000-32000 between nodes;"
            " GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network to use"
        )
    return Row("probe job", "fail", detail, advice)


def complaint(folder: Path) -> str:
    """What the job's tasks wrote first about an error, else what srun did; empty for nothing."""
    first = ""
    for path in sorted(folder.glob("*_log.err")):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("flearn:") or _is_an_error_of_a_task(line):
                return line.strip()[:200]
            first = first or line.strip()
    return first[:200]


def _is_an_error_of_a_task(line: str) -> bool:
    """A Python error, not srun's report of it, nor a line between asterisks about the job's end."""
    return "rror: " in line and not line.startswith("srun:") and "*** " not in line


def _shared_folder(probed: Probed) -> Row:
    runs_dir = probed.folder.parent
    apart = [report for report in probed.reports if report.num_seen < probed.cluster.ranks]
    if apart:
        detail = f"{apart[0].host} does not see in {runs_dir} what the others wrote there"
        advice = "set cluster.runs_dir to a folder that is the same on all nodes"
        return Row("shared folder", "fail", detail, advice)
    free = min(report.disk_bytes for report in probed.reports) / _GIB
    return Row("shared folder", "ok", f"{runs_dir} is the same on {probed.hosts}, {free:.1f} GiB free")


def _inputs(probed: Probed) -> Row:
    lacking = [report for report in probed.reports if report.missing]
    if lacking:
        detail = f"{lacking[0].host} does not see {', '.join(lacking[0].missing)}"
        return Row("inputs", "fail", detail, "put the model and the facts into a folder that all nodes see")
    return Row("inputs", "ok", "the nodes see the config's files")


def _versions(probed: Probed) -> Row:
    here = machine.versions()
    absent, differ = set(), set()
    for report in probed.reports:
        for name, version in report.versions.items():
            if version is None:
                absent.add(f"{name} on {report.host}")
            elif version != here[name]:
                differ.add(f"{name} {version} on {report.host} (here: {here[name]})")
    if absent:
        advice = "install flearn for the site's `python`, or in its image"
        return Row("packages", "fail", f"not installed: {', '.join(sorted(absent))}", advice)
    if differ:
        advice = "results of different versions may differ; all nodes should have the same"
        return Row("packages", "warn", "; ".join(sorted(differ)), advice)
    return Row("packages", "ok", "the nodes' versions are those of this environment")


def _signals(probed: Probed) -> Row:
    deaf = [report for report in probed.reports if not report.signalled]
    if deaf:
        ranks = ", ".join(f"{report.rank} on {report.host}" for report in deaf)
        advice = (
            "a job cannot save when told to: let the site's `python` or `setup` start it by exec;"
            " lower checkpoint_every_steps"
        )
        return Row("signals", "fail", f"SIGUSR2 did not reach rank {ranks}", advice)
    return Row("signals", "ok", "SIGUSR2 reached every rank")


def _cores(probed: Probed) -> Row:
    wanted = probed.site.cpus_per_rank
    report = min(probed.reports, key=lambda report: report.num_cores)
    if report.num_cores < wanted:
        which = f"rank {report.rank} on {report.host}"
        detail = f"{which} may use {report.num_cores} of the {wanted} cores asked for"
        advice = "the site's srun_args: [--cpu-bind=none], or a smaller cpus_per_rank"
        return Row("cores", "warn", detail, advice)
    memory = f"{report.host_bytes / _GIB:.1f} GiB of memory for the job on each node"
    return Row("cores", "ok", f"{wanted} a rank; {memory}")


def _gpus(probed: Probed) -> Row:
    blind = [report for report in probed.reports if not report.gpus]
    if not blind:
        return _gpu_row(probed.reports)
    asked, host, driver = probed.site.gpus, blind[0].host, blind[0].driver
    if asked is not None:
        detail = f"asked for by {asked}, but torch sees none on {host} (driver: {driver or 'not loaded'})"
        advice = (
            "install the torch build for the driver's CUDA version; a container needs its GPU flag (--nv)"
        )
        return Row("GPUs", "fail", detail, advice)
    if driver is not None:
        detail = f"{host} has an NVIDIA driver ({driver}), but the job asks for no GPU"
        return Row("GPUs", "warn", detail, "site file: gpus")
    return Row("GPUs", "ok", "none asked for: everything runs on the CPU")


def _gpu_row(reports: list[Report]) -> Row:
    """Where every rank sees a GPU. Each sees those of its task, or all of its node."""
    first = reports[0]
    per_node: dict[str, int] = {}
    for report in reports:
        per_node[report.host] = max(per_node.get(report.host, 0), len(report.gpus))
    detail = ", ".join(f"{host}: {number} x {first.gpus[0]}" for host, number in per_node.items())
    least = min(number for report in reports for number in report.gpu_bytes) / _GIB
    detail += f", {least:.0f} GiB each, driver {first.driver}, NCCL {first.nccl}"
    if len({(report.driver, report.nccl, *report.gpus[:1]) for report in reports}) > 1:
        advice = "the nodes differ in GPU, driver or NCCL: name one kind in the site's gpu_type"
        return Row("GPUs", "warn", detail, advice)
    return Row("GPUs", "ok", detail)
