"""Memory is bounded whatever the size of the model, sampled from /proc while the command runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MOST_MIB = 350
"""Anonymous memory of the whole command, the interpreter included, with the default of --memory 256MiB."""
IMPORTS_MIB = 20
"""What the command imports besides torch."""

pytestmark = pytest.mark.slow


def measure(bench: str, folder: Path, *options: str) -> dict[str, Any]:
    """The benchmark's figures. It removes the models that it makes."""
    program = [sys.executable, str(ROOT / "tests/bench" / bench), "--folder", str(folder), *options]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        program, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def test_a_model_three_times_as_large_takes_no_more(tmp_path: Path) -> None:
    peaks = []
    for num_layers in ("1", "7"):
        figures = measure("subtract.py", tmp_path, "--layers", num_layers, "--rounds", "0")
        peaks.append(figures["command_peak_mib"])
    assert max(peaks) <= MOST_MIB
    assert peaks[1] <= 1.1 * peaks[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stage", "ranks"), [("2", "2"), ("3", "8")])
def test_zero_partitions_take_no_more(tmp_path: Path, stage: str, ranks: str) -> None:
    figures = measure("zero.py", tmp_path, "--layers", "4", "--stage", stage, "--ranks", ranks, "--only-ours")
    assert figures["subtract_peak_mib"] <= MOST_MIB


@pytest.mark.parametrize(
    ("layout", "memory_mib"), [((), 40), (("--conv1d",), 40), (("--dtype", "same"), 256)]
)
def test_an_adapter_of_high_rank_on_a_large_vocabulary_takes_no_more(
    tmp_path: Path, layout: tuple[str, ...], memory_mib: int
) -> None:
    """The vocabulary's factor alone is 300 MiB in float64."""
    options = [
        "--out-features",
        "152064",
        "--in-features",
        "256",
        "--rank",
        "256",
        "--memory",
        f"{memory_mib}MiB",
    ]
    figures = measure("adapter.py", tmp_path, *options, *layout)
    assert figures["command_peak_mib"] <= figures["import_torch_peak_mib"] + IMPORTS_MIB + memory_mib
