"""The one-box cluster of `slurm/dev/` for tests: with a folder and ports of its own, deleted afterwards."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "slurm/dev/cluster.sh"
_PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]


@contextmanager
def dev_cluster() -> Iterator[dict[str, str]]:
    """Start the cluster; yields the environment for its users, with this interpreter first on the PATH."""
    folder = Path("/tmp") / f"flearn-slurm-test-{os.getpid()}"  # a short path: it holds sockets
    env = os.environ | {
        "FLEARN_SLURM_DIR": str(folder),
        "FLEARN_SLURM_PORT": str(free_ports(6)),
        "SLURM_CONF": str(folder / "etc/slurm.conf"),
        "PATH": f"{Path(sys.executable).parent}:{_PATH}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    try:
        subprocess.run([str(CLUSTER), "up"], env=env, check=True, timeout=600, stdout=subprocess.DEVNULL)
        yield env
    finally:
        subprocess.run([str(CLUSTER), "purge"], env=env, check=True, timeout=600)


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on.

    They lie below 20000: from there on, the ranks of jobs meet (`launch/slurm/stage_job.py`).
    """
    for first in range(11000 + os.getpid() % 4000, 20000 - count, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no ports")
