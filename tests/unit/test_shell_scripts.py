"""Shell scripts: shellcheck finds nothing, and an sbatch script that bash starts says what to do instead."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
FOLDERS = [
    path
    for path in ROOT.iterdir()
    if path.is_dir() and not path.name.startswith(".") and path.name not in ("build", "runs")
]
SCRIPTS = sorted(
    [ROOT / ".ci/run", *ROOT.glob("*.sh"), *(script for folder in FOLDERS for script in folder.rglob("*.sh"))]
)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck(script: Path) -> None:
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_an_sbatch_script_started_with_bash_refuses(script: Path, tmp_path: Path) -> None:
    # With a `flearn` and an `srun` that would do: neither may be reached.
    for name in ("flearn", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(script)],
        cwd=ROOT,
        env=env | {"PATH": f"{tmp_path}:{env['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert (
        done.stderr.count("\n") == 1
        and "submit it with: sbatch" in done.stderr
        and script.name in done.stderr
    )
