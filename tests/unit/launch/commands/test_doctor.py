"""`flearn doctor`: one line a finding, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_configs import LLAMA2_7B

from launch.cli import main


@pytest.mark.processes
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


@pytest.mark.processes
def test_gpus_that_are_not_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B))
    root = Path(__file__).parents[4]
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
