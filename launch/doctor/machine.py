"""What this machine has and lacks: versions, devices, cores, memory, disks, network, compiler, scheduler."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

State = Literal["ok", "warn", "fail"]

_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
_NEEDED = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
    "pydantic",
    "PyYAML",
    "blake3",
    "datasets",
)
"""Packages that a run uses: of the pinned ones, only these are compared."""
_OLDEST_PYTHON = (3, 10)
_GIB = 1 << 30


class Row(NamedTuple):
    """One finding: what was looked at, whether it will do, what was found, and what to do about it."""

    check: str
    state: State
    detail: str
    advice: str = ""


class Devices(NamedTuple):
    """Where fine-tuning runs: the GPUs' names and memory in bytes; none means the CPU."""

    names: list[str]
    memory_bytes: list[int]


def rows(runs_dir: Path, ranks: int, devices: Devices) -> Iterator[Row]:
    """Every check of this machine, for runs that are kept in `runs_dir` and use `ranks` processes here."""
    yield _python()
    yield from packages(_CONSTRAINTS)
    yield device_row(devices, ranks)
    yield cores_row(len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS"), ranks)
    yield Row("memory", "ok", f"{host_memory_bytes() / _GIB:.1f} GiB free for this process and its children")
    yield disk_row(runs_dir)
    yield shared_memory_row(shutil.disk_usage("/dev/shm").free, len(devices.names))
    yield _hub()
    yield _compiler()
    yield _slurm()


def _python() -> Row:
    version = platform.python_version()
    if tuple(map(int, platform.python_version_tuple()[:2])) < _OLDEST_PYTHON:
        return Row("python", "fail", version, "make the environment with Python 3.10 or newer")
    return Row("python", "ok", version)


def packages(constraints: Path) -> Iterator[Row]:
    """Versions against those the project is tested with, the `name==version` lines of `constraints`."""
    tested = _tested_versions(constraints)
    if not tested:
        detail = f"no {constraints.name} beside the program to compare with"
        yield Row("packages", "warn", detail, "run from a clone to compare versions")
        return
    differ = []
    for name, version in tested.items():
        found = _version(name)
        if found is None:
            yield Row("packages", "fail", f"{name} is not installed", f"pip install {name}=={version}")
        elif found != version:
            differ.append(f"{name} {found} (tested: {version})")
    if differ:
        advice = f"if something fails: pip install -c {constraints.name} ..."
        yield Row("packages", "warn", "; ".join(differ), advice)
    else:
        yield Row("packages", "ok", "installed ones are the tested versions")


def _tested_versions(constraints: Path) -> dict[str, str]:
    if not constraints.is_file():
        return {}
    versions = {}
    for line in constraints.read_text().splitlines():
        name, is_pinned, version = line.partition(";")[0].partition("==")
        if is_pinned and name.strip() in _NEEDED:
            versions[name.strip()] = version.strip()
    return versions


def versions() -> dict[str, str | None]:
    """What is installed of Python and of the packages that a run needs, by name; None for one that is not."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _NEEDED}


def _version(name: str) -> str | None:
    """The installed version without its local part (`2.13.0+cpu` is 2.13.0)."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def find_devices() -> Devices:
    """The GPUs that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return Devices([], [])
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Devices([one.name for one in properties], [one.total_memory for one in properties])


def driver_version() -> str | None:
    """The NVIDIA kernel driver's version; None where there is none."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def nccl_version() -> str | None:
    """The version of torch's NCCL; None for a torch without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def device_row(devices: Devices, ranks: int) -> Row:
    """GPUs, or why there are none."""
    import torch

    if not devices.names:
        return no_gpu_row(driver_version(), Path("/dev/nvidiactl").exists(), torch.version.cuda)
    number = len(devices.names)
    found = f"{number} x {devices.names[0]}, {devices.memory_bytes[0] / _GIB:.0f} GiB each"
    found += f", CUDA {torch.version.cuda}, driver {driver_version()}, NCCL {nccl_version()}"
    if number < ranks:
        advice = f"cluster.ranks is {ranks}, one GPU each: set cluster.ranks={number}"
        return Row("devices", "fail", found, advice)
    return Row("devices", "ok", found)


def no_gpu_row(driver: str | None, has_devices: bool, cuda: str | None) -> Row:
    """Why torch, built for `cuda`, sees no GPU.

    A container sees its host's driver in any case, but GPUs' devices (`has_devices`) only if it was given
    some.
    """
    if driver is None:
        return Row("devices", "ok", "no GPU: everything runs on the CPU, which suits tiny and small models")
    if not has_devices:
        found = f"no GPU here, though an NVIDIA driver ({driver}) is loaded: everything runs on the CPU"
        return Row("devices", "warn", found, "to use GPUs in a container: docker run --gpus all")
    what = "is built without CUDA" if cuda is None else f"(CUDA {cuda}) cannot use it"
    found = f"an NVIDIA driver ({driver}) is loaded, but torch {what}"
    advice = "install the torch build for the driver's CUDA version, or update the driver"
    return Row("devices", "fail", found, advice)


def cores_row(num_cores: int, omp_threads: str | None, ranks: int) -> Row:
    """Whether the ranks' threads fit the cores; too many make a run several times slower."""
    found = f"{num_cores}, OMP_NUM_THREADS={omp_threads or 'not set (flearn run sets it)'}"
    if ranks > num_cores:
        advice = f"cluster.ranks is {ranks}: more processes than cores; set cluster.ranks={num_cores}"
        return Row("cores", "warn", found, advice)
    if omp_threads is not None and omp_threads.isdigit() and int(omp_threads) * ranks > num_cores:
        fitting = max(1, num_cores // ranks)
        advice = f"{ranks} ranks would use {int(omp_threads) * ranks} threads"
        return Row("cores", "warn", found, f"{advice}; export OMP_NUM_THREADS={fitting}")
    return Row("cores", "ok", found)


def host_memory_bytes() -> int:
    """Memory still free here: what the kernel has available, or less, where a container's limit says so."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    root = Path("/sys/fs/cgroup")
    limits = (  # of cgroups 2 and 1
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
    for limit, used in limits:
        if not (root / limit).is_file():
            continue
        text = (root / limit).read_text().strip()
        if text.isdigit():  # else "max"
            available = min(available, max(0, int(text) - int((root / used).read_text())))
    return available


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(path for path in [folder, *folder.parents] if path.is_dir())


def disk_row(runs_dir: Path) -> Row:
    """Whether runs can be written where they are kept."""
    place = existing(runs_dir)
    detail = f"{shutil.disk_usage(place).free / _GIB:.1f} GiB free for {runs_dir}"
    if not os.access(place, os.W_OK):
        return Row("disk", "fail", f"{place} is not writable", "set cluster.runs_dir to a folder of yours")
    return Row("disk", "ok", detail)


def shared_memory_row(free: int, num_gpus: int) -> Row:
    """/dev/shm, through which NCCL moves data between the GPUs of one machine."""
    detail = f"{free / _GIB:.2f} GiB free in /dev/shm"
    if num_gpus > 1 and free < _GIB:  # docker gives a container 64 MiB
        advice = "NCCL needs more: docker run --ipc=host, or --shm-size=8g"
        return Row("shared memory", "warn", detail, advice)
    return Row("shared memory", "ok", detail)


def _hub() -> Row:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        detail = "HF_HUB_OFFLINE is set: only models and data in the local cache are used"
        return Row("model hub", "ok", detail)
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").partition("://")[2].partition("/")[0]
    name, _, port = host.partition(":")
    try:
        with socket.create_connection((name, int(port or 443)), timeout=2):
            return Row("model hub", "ok", f"{host} answers")
    except OSError as error:
        advice = (
            "models and data must be local folders or in the cache:"
            " `flearn models fetch`, or `hf download` where there is a network"
        )
        return Row("model hub", "warn", f"{host} cannot be reached ({error.strerror or error})", advice)


def _compiler() -> Row:
    installed = (name for name in ("c++", "g++", "clang++") if shutil.which(name))
    compiler = os.environ.get("CXX") or next(installed, None)
    if compiler is None or shutil.which(compiler) is None:
        advice = "needed only for DeepSpeed's optional compiled ops: apt install g++"
        return Row("C++ compiler", "warn", f"{compiler} not found" if compiler else "none found", advice)
    return Row("C++ compiler", "ok", compiler)


def _slurm() -> Row:
    if shutil.which("sbatch") is None:
        return Row("SLURM", "ok", "not here")
    done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        detail = f"sbatch does not work here: {last}"
        return Row("SLURM", "warn", detail, "use --on here, or a login node of the cluster")
    return Row("SLURM", "ok", done.stdout.strip())
