"""All stages inside one allocation of two nodes, through `sbatch slurm/single_allocation.sh`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dev_cluster import ROOT
from halts import Halt, environment, wait_until
from slurm_chains import ONE_METHOD, copy_before, needs_slurm, require_same, settings, slurm

pytestmark = needs_slurm


@pytest.fixture
def job(command: Path, undisturbed: Path, tmp_path: Path) -> str:
    """Its number, once its `learn` has halted on rank 0, amid its steps."""
    copy_before("learn", undisturbed, tmp_path / "quickstart")
    halt = Halt(tmp_path / "halt", str(tmp_path / "quickstart/learn-*/checkpoints/*/complete.json"))
    shape = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--signal=USR2@120"]
    options = ["--parsable", f"--chdir={ROOT}", f"--output={tmp_path}/log", *shape]
    arguments = ["configs/quickstart.yaml", *settings(tmp_path, ONE_METHOD)]
    env = environment(halt) | {"PATH": f"{command}:{os.environ['PATH']}"}
    job = slurm("sbatch", *options, str(ROOT / "slurm/single_allocation.sh"), *arguments, **env).strip()
    halt.wait()
    return job


def test_a_warned_job_comes_back_and_ends_as_undisturbed(job: str, undisturbed: Path, tmp_path: Path) -> None:
    slurm("scancel", "--signal=USR2", job)
    what = f"the end: {(tmp_path / 'log').read_text()}"
    wait_until(lambda: (tmp_path / "quickstart/results.json").exists(), what)
    assert "Restarts=1" in slurm("scontrol", "show", "job", job)
    require_same(tmp_path / "quickstart", undisturbed)


def test_a_cancelled_job_stays_away(job: str) -> None:
    slurm("scancel", job)
    states = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    wait_until(lambda: slurm(*states).strip() not in ("RUNNING", "COMPLETING"), "the job's end")
    assert slurm(*states).strip() == "CANCELLED"
