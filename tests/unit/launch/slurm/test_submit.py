"""`from launch import submit`: it is there, and planning with it imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch import submit
from pipeline.errors import InputError

ROOT = Path(__file__).parents[4]


@pytest.mark.processes
def test_the_import_is_light() -> None:
    code = "import sys; from launch import submit; "
    code += "print(submit.__name__, {'torch', 'submitit', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "submit set()"


@pytest.mark.parametrize(
    ("override", "said"),
    [("name=a/b", "name"), ("metods=[lora]", "did you mean methods"), ("seed", "KEY=VALUE")],
)
def test_a_mistake_is_an_input_error_and_nothing_is_written(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        submit(ROOT / "configs/quickstart.yaml", [override, f"cluster.runs_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="has no SLURM"):
        submit(ROOT / "configs/quickstart.yaml", [f"cluster.runs_dir={tmp_path / 'runs'}"])
    assert not (tmp_path / "runs").exists()
