"""All stages inside one allocation of two nodes, through `sbatch slurm/single_allocation.sh`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from dev_cluster import ROOT
from slurm_chains import ZERO, copy_before, figures, needs_slurm, num_steps, settings, slurm, wait_until

pytestmark = needs_slurm


@pytest.fixture
def job(command: Path, undisturbed: Callable[[int], Path], tmp_path: Path) -> str:
    """Its number, once its `learn` is at work."""
    copy_before("learn", undisturbed(2), tmp_path / "quickstart")
    options = [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--signal=USR2@120",
        f"--output={tmp_path}/log",
    ]
    script = [
        str(ROOT / "slurm/single_allocation.sh"),
        "configs/quickstart.yaml",
        *settings(tmp_path, *ZERO[2]),
    ]
    env = os.environ | {"PATH": f"{command}:{os.environ['PATH']}"}
    started = ["sbatch", "--parsable", f"--chdir={ROOT}", *options, *script]
    job = subprocess.run(
        started, env=env, capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()
    wait_until(lambda: num_steps(tmp_path) > 12, "some steps")
    return job


def test_a_warned_job_comes_back_and_ends_as_undisturbed(
    job: str, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    slurm("scancel", "--signal=USR2", job)
    wait_until(
        lambda: (tmp_path / "quickstart/results.json").exists(), f"the end: {(tmp_path / 'log').read_text()}"
    )
    assert "Restarts=1" in slurm("scontrol", "show", "job", job)
    assert figures(tmp_path / "quickstart") == figures(undisturbed(2))


def test_a_cancelled_job_stays_away(job: str) -> None:
    slurm("scancel", job)
    states = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    state = wait_until(
        lambda: slurm(*states).strip() not in ("RUNNING", "COMPLETING") and slurm(*states).strip(),
        "the job's end",
        60,
    )
    assert state == "CANCELLED"
