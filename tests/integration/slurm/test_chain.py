"""Chains of jobs give the figures of a run here; refusals, failing stages and sweeps."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from dev_cluster import ROOT
from halts import Halt, wait_until
from slurm_chains import (
    METHODS,
    ONE_METHOD,
    copy_before,
    flearn,
    in_queue,
    needs_slurm,
    require_same,
    run,
    settings,
    slurm,
    status,
)

from launch.run_folder import RunFolder

pytestmark = needs_slurm


def test_the_chain_gives_the_models_and_figures_of_a_run_here(
    command: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """All of it by `sbatch slurm/flearn_llama7b.sh`, each subtraction in three parts."""
    run_dir, log = tmp_path / "quickstart", tmp_path / "submit.log"
    arguments = ["configs/quickstart.yaml", *settings(tmp_path, METHODS, "cluster.forget_parts=3")]
    options = [f"--chdir={ROOT}", f"--output={log}"]
    path = f"{command}:{os.environ['PATH']}"
    slurm("sbatch", *options, str(ROOT / "slurm/flearn_llama7b.sh"), *arguments, PATH=path)
    wait_until(lambda: (run_dir / "results.json").exists(), f"the end of {run_dir}")
    require_same(run_dir, undisturbed)
    results = json.loads((run_dir / "results.json").read_text())
    assert any(row["reliability"] for row in results["rows"])
    assert len(list(run_dir.glob("forget-*/part-?-of-3.json"))) == 3 * len(list(run_dir.glob("forget-*")))
    assert {row["state"] for row in status(run_dir).values()} == {"done"}
    assert "flearn status" in log.read_text()
    again = flearn("run", *arguments, "--on", "slurm")
    assert "nothing to submit" in again.stdout


def test_on_local_gives_the_same(undisturbed: Path, tmp_path: Path) -> None:
    copy_before("forget", undisturbed, tmp_path / "quickstart")
    require_same(run(tmp_path, "local", ONE_METHOD), undisturbed)


def test_a_failing_stage_says_why_and_the_later_ones_are_cancelled(undisturbed: Path, tmp_path: Path) -> None:
    copy_before("teach", undisturbed, tmp_path / "quickstart")
    run_dir = run(tmp_path, "slurm", ONE_METHOD, "teach.max_length=2")
    wait_until(lambda: not in_queue(run_dir), "the end of the chain")
    found = status(run_dir)
    assert found["teach"]["state"] == "failed"
    assert "max_length" in found["teach"]["note"] and "rank" in found["teach"]["note"], found["teach"]
    assert Path(found["teach"]["note"].rpartition("(see ")[2].rstrip(")")).is_file()
    teach = next(id for id in found if id.startswith("teach-"))
    assert found["tune_old"] == found["tune_old"] | {"state": "cancelled", "note": f"needs {teach}"}
    assert {row["state"] for row in found.values()} == {"done", "failed", "cancelled"}


@pytest.mark.parametrize(
    ("site", "override", "said"),
    [
        ("partition: nowhere", "seed=0", "invalid partition"),
        ("account: nobody", "seed=0", "Invalid account"),
        ("partition: debug", "cluster.nodes=4", "Node count specification invalid"),
    ],
)
def test_refused_is_one_line_and_leaves_nothing_in_the_queue(
    tmp_path: Path, site: str, override: str, said: str
) -> None:
    (tmp_path / "site.yaml").write_text(site + "\n")
    before = slurm("squeue", "--noheader", "--format=%F")
    overrides = [f"cluster.site={tmp_path / 'site.yaml'}", "cluster.ranks=4", override]
    done = flearn("run", "configs/quickstart.yaml", "--on", "slurm", *settings(tmp_path, *overrides))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    queue = ("squeue", "--noheader", "--format=%F")
    wait_until(lambda: set(slurm(*queue).split()) <= set(before.split()), "an empty queue")


def test_a_sweep_shares_what_it_can(tmp_path: Path) -> None:
    methods = "methods=[full_ft,lora,flearn_ft,flearn_lora,flearn_lora_ft]"
    # Nothing is done before all is submitted.
    halt = Halt(tmp_path / "halt", str(tmp_path / "quickstart/facts-*/manifest.json"))
    run_dir = run(tmp_path, "slurm", methods, "forget.scale=0.1", halts=[halt])
    first = RunFolder(run_dir).jobs()
    run(tmp_path, "slurm", methods, "forget.scale=0.2")
    after = RunFolder(run_dir).jobs()
    assert len(after) > 30
    assert {step: after[step] for step in first} == first
    stages = {step.rpartition("-")[0] for step in after.keys() - first.keys()}
    assert stages == {"forget", "learn", "evaluate", "report"}
    found = json.loads(flearn("status", str(run_dir), "--json").stdout)
    assert {row["id"] for row in found} == after.keys()
    assert flearn("cancel", str(run_dir)).returncode == 0
    wait_until(lambda: not in_queue(run_dir), "an empty queue")


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sh")))
def test_every_script_is_accepted_and_refuses_bash(script: str) -> None:
    options = ["--ntasks-per-node=2", "--cpus-per-task=1"] if script == "single_allocation.sh" else []
    slurm("sbatch", "--test-only", *options, str(ROOT / "slurm" / script))
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_JOB")}
    done = subprocess.run(["bash", f"slurm/{script}"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "submit it with: sbatch" in done.stderr
