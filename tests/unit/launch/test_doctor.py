"""`flearn doctor`: the command, and what it finds on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main
from launch.doctor import machine
from launch.doctor.machine import Devices

GB = 10**9
LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def test_packages_against_the_tested_versions(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    installed = machine._version("pydantic")
    constraints.write_text(f"# tested\npydantic=={installed}\nsphinx==1.0\n")
    assert [row.state for row in machine.packages(constraints)] == ["ok"]
    constraints.write_text('pydantic==0.0.1; python_version >= "3.10"\n')
    (row,) = machine.packages(constraints)
    assert row.state == "warn" and f"pydantic {installed} (tested: 0.0.1)" in row.detail
    assert [row.state for row in machine.packages(tmp_path / "absent.txt")] == ["warn"]


def test_more_threads_than_cores() -> None:
    assert machine.cores_row(8, "4", ranks=2).state == "ok"
    assert "OMP_NUM_THREADS=2" in machine.cores_row(8, "4", ranks=4).advice
    assert "cluster.ranks=8" in machine.cores_row(8, None, ranks=16).advice


def test_fewer_gpus_than_ranks() -> None:
    devices = Devices(["A100"] * 2, [80 * GB] * 2)
    assert machine.device_row(devices, ranks=2).state == "ok"
    row = machine.device_row(devices, ranks=4)
    assert row.state == "fail" and "cluster.ranks=2" in row.advice


def test_a_gpu_that_torch_cannot_use_is_a_failure_and_one_that_was_not_given_is_none() -> None:
    assert machine.no_gpu_row(None, False, "13.0").state == "ok"
    row = machine.no_gpu_row("580.65.06", False, "13.0")
    assert row.state == "warn" and "--gpus all" in row.advice, (
        "the image's health check runs on such hosts too"
    )
    assert machine.no_gpu_row("535.1", True, "13.0").state == "fail"
    assert "without CUDA" in machine.no_gpu_row("580.65.06", True, None).detail


def test_little_shared_memory_matters_to_several_gpus() -> None:
    assert machine.shared_memory_row(64 << 20, num_gpus=0).state == "ok"
    assert machine.shared_memory_row(64 << 20, num_gpus=2).state == "warn"


def test_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"python", "packages", "devices", "cores", "memory", "disk", "SLURM"} <= {
        line[6:].split(":")[0] for line in lines
    }
    assert main(["doctor", str(tmp_path / "absent.yaml")]) == 2
    assert main(["doctor", "--set", "cluster.ranks=4"]) == 2


def test_gpus_that_are_not_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B))
    root = Path(__file__).parents[3]
    options = [
        "model.path=" + str(tmp_path),
        f"facts.path={root}/configs/facts/world_updates.jsonl",
        "facts.format=auto",
        "cluster.ranks=4",
    ]
    command = [
        "doctor",
        str(root / "configs/llama2_7b_zsre.yaml"),
        *(part for option in options for part in ("--set", option)),
    ]
    main([*command, "--gpu-memory", "80GB"])
    found = capsys.readouterr().out
    assert "ok    teach: 45.9 GB a rank of 80.0 GB" in found and "time for this run: not estimated" in found
    assert main([*command, "--gpu-memory", "24GB"]) == 1
    found = capsys.readouterr().out
    assert "fail  teach: 45.9 GB a rank of 24.0 GB" in found
    assert "-> less memory: a smaller evaluate.batch_size; or evaluate.precision: bf16" in found
    assert main([*command, "--gpu-memory", "much"]) == 2
