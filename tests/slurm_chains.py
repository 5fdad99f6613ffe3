"""Chains of jobs on a real SLURM: begun, watched, and compared by what they made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from dev_cluster import MISSING, ROOT
from halts import Halt, environment

from launch.run_folder import RunFolder

needs_slurm = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: see slurm/dev/cluster.sh"),
    pytest.mark.skipif(os.geteuid() != 0, reason="naming the virtual nodes in /etc/hosts needs root"),
]

# The quickstart with few facts, two ZeRO stages, and many checkpoints, at which fine-tunings are disturbed.
SMALL = [
    "facts.limit=12",
    "model.tiny.num_layers=2",
    "teach.epochs=20",
    "teach.deepspeed=configs/deepspeed/zero2.json",
    "full.epochs=20",
    "full.checkpoint_every_steps=2",
    "full.deepspeed=configs/deepspeed/zero3.json",
    "lora.epochs=20",
    "lora.deepspeed=configs/deepspeed/zero2.json",
    "evaluate.max_new_tokens=4",
    "evaluate.protocols=[token]",
    "forget.max_shard_size=1MB",
    "cluster.ranks=2",
    "cluster.nodes=2",
]
METHODS = "methods=[lora,flearn_ft,flearn_lora_ft]"
"""One that forgets nothing, one that subtracts a full fine-tuning, one that subtracts an adapter."""
ONE_METHOD = "methods=[flearn_ft]"
"""Enough for a chain that is disturbed. Its steps are among those of the three."""


def settings(runs: Path, *overrides: str) -> list[str]:
    return [part for s in [*SMALL, f"cluster.runs_dir={runs}", *overrides] for part in ("--set", s)]


def flearn(*arguments: str, halts: Sequence[Halt] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    env = os.environ | environment(*halts)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def run(runs: Path, on: str, *overrides: str, halts: Sequence[Halt] = ()) -> Path:
    """Jobs have the environment of who submits them: those that come to `halts` halt there."""
    done = flearn("run", "configs/quickstart.yaml", "--on", on, *settings(runs, *overrides), halts=halts)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "quickstart"


def slurm(*command: str, **variables: str) -> str:
    """What a command of SLURM's prints, with these variables in its environment."""
    env = os.environ | variables
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300).stdout


def status_text(run_dir: Path) -> str:
    return flearn("status", str(run_dir)).stdout


def status(run_dir: Path) -> dict[str, dict[str, Any]]:
    """By step id, or by stage where there is one of it."""
    rows = json.loads(flearn("status", str(run_dir), "--json").stdout)
    return {row["id"]: row for row in rows} | {row["id"].rpartition("-")[0]: row for row in rows}


def require_same(run_dir: Path, right: Path) -> None:
    """Fail unless a run gives the figures, and the forgotten and learned models, of one with more methods."""
    results, expected = (json.loads((path / "results.json").read_text())["rows"] for path in (run_dir, right))
    methods = {row["method"] for row in results}
    assert results == [row for row in expected if row["method"] in methods]
    made = [*run_dir.glob("forget-*/model/*.safetensors"), *run_dir.glob("learn-*/*/*.safetensors")]
    assert made
    for path in made:
        assert path.read_bytes() == (right / path.relative_to(run_dir)).read_bytes(), path


def in_queue(run_dir: Path) -> str:
    """Jobs of this run that SLURM has not ended."""
    ids = set(RunFolder(run_dir).jobs().values())
    lines = slurm("squeue", "--noheader", "--format=%F %T").splitlines()
    return "".join(line for line in lines if line.split()[0] in ids)


def num_steps(runs: Path) -> int:
    """Optimizer steps that `learn` has done."""
    return sum(path.read_bytes().count(b"\n") for path in runs.glob("quickstart/learn-*/steps.jsonl"))


def copy_before(stage: str, reference: Path, run_dir: Path) -> None:
    """Begin a run with what the reference run made, but for `stage` and what follows from it."""
    left_out: set[str] = set()
    for step in json.loads((reference / "plan.json").read_text())["steps"]:
        if step["stage"] == stage or left_out & set(step["inputs"].values()):
            left_out.add(step["id"])
        else:
            shutil.copytree(reference / step["id"], run_dir / step["id"])


def find_process(wanted: set[bytes]) -> int:
    """The Python process of a job with these variables in its environment; 0 if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            program, *arguments = (process / "cmdline").read_bytes().split(b"\0")
            is_of_a_job = b"python" in program and b"submitit.core._submit" in arguments
            if is_of_a_job and wanted <= set((process / "environ").read_bytes().split(b"\0")):
                return int(process.name)
        except OSError:  # it has ended meanwhile
            continue
    return 0
