from __future__ import annotations

import json
from pathlib import Path

import pytest
from delta_models import formula, layered, load, nudged, save, write_pair

from launch.cli import main


def subtract(folder: Path, *options: str) -> int:
    sources = ["--base", str(folder / "base"), "--tuned", str(folder / "tuned"), "--out", str(folder / "out")]
    return main(["delta", "subtract", *sources, "--scale", "0.3", *options])


def test_subtract_writes_a_model_and_says_what_survived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = write_pair(tmp_path)
    assert subtract(tmp_path) == 0
    made, right = load(tmp_path / "out"), formula(load(base), load(tuned), 0.3)
    assert all(made[name].equal(values) for name, values in right.items())
    told = capsys.readouterr().out
    assert "1 shard" in told and "float32" in told
    assert "100.0% of the intended change is stored" in told
    assert subtract(tmp_path) == 0
    assert "already done" in capsys.readouterr().out


def test_a_narrow_result_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "base", layered(0))
    save(tmp_path / "tuned", nudged(layered(0), 1, std=1e-5))
    assert subtract(tmp_path, "--dtype", "same") == 0
    assert "warning: only" in capsys.readouterr().out


def test_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path)
    assert subtract(tmp_path, "--max-shard-size", "20KB", "--part", "2/2") == 0
    assert "left to other parts" in capsys.readouterr().out
    assert subtract(tmp_path, "--max-shard-size", "20KB", "--part", "1/2") == 0
    assert "of the intended change is stored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scale", "nan"], "scale nan"),
        (["--tuned", "nowhere"], "nowhere: no such file"),
        (["--memory", "1KiB"], "--memory"),
        (["--max-shard-size", "lots"], "'lots' is not a size"),
        (["--part", "3/2"], "part 3/2"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    write_pair(tmp_path)
    assert subtract(tmp_path, *options) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["2", "a/b", "1/", "1/2/3"])
def test_a_part_that_is_none(tmp_path: Path, part: str) -> None:
    with pytest.raises(SystemExit) as caught:
        subtract(tmp_path, "--part", part)
    assert caught.value.code == 2


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = write_pair(tmp_path)
    assert main(["delta", "inspect", str(base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "safetensors"
    assert main(["delta", "inspect", str(base)]) == 0
    assert "101x33" in capsys.readouterr().out


def test_verify_exits_1_and_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path)
    subtract(tmp_path)
    assert main(["delta", "verify", str(tmp_path / "out")]) == 0
    assert "as it should be" in capsys.readouterr().out
    path = tmp_path / "out/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)
    assert main(["delta", "verify", str(tmp_path / "out")]) == 1
    assert "elements differ" in capsys.readouterr().out
    assert main(["delta", "verify", str(tmp_path / "base")]) == 2


def test_undo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = write_pair(tmp_path)
    subtract(tmp_path)
    assert main(["delta", "undo", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    back = load(tmp_path / "back")
    assert all(back[name].equal(values) for name, values in load(base).items())
    assert "survival" not in capsys.readouterr().out.splitlines()[-1]
