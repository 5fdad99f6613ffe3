"""`flearn delta`: what each action prints, and its exit code."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import pytest
from delta_models import formula, layered, load, nudged, save, write_pair

from launch.cli import main


def subtract(folder: Path, *options: str) -> int:
    sources = ["--base", str(folder / "base"), "--tuned", str(folder / "tuned"), "--out", str(folder / "out")]
    return main(["delta", "subtract", *sources, "--scale", "0.3", *options])


def test_subtract_writes_a_model_and_says_what_survived(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = write_pair(tmp_path)
    assert subtract(tmp_path) == 0
    made, right = load(tmp_path / "out"), formula(load(base), load(tuned), 0.3)
    assert all(made[name].equal(values) for name, values in right.items())
    told = capsys.readouterr().out
    assert re.match(
        r"writes 71\.\d kB in 1 shard \(float32; the base is bfloat16, 36\.\d kB\); \d.* are free\n", told
    )
    assert "out: 71." in told and "kB in 1 shard, float32" in told
    assert "100.0% of the intended change is stored" in told
    assert subtract(tmp_path) == 0
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize("scale", ["-1e-1", "-.1", "-1E-1", "-0.1"])
def test_a_negative_scale_is_no_option(tmp_path: Path, scale: str) -> None:
    base, tuned = write_pair(tmp_path)
    assert subtract(tmp_path, "--scale", scale) == 0
    right = formula(load(base), load(tuned), -0.1)
    assert all(made.equal(right[name]) for name, made in load(tmp_path / "out").items())


def test_a_result_without_a_config_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = write_pair(tmp_path)
    assert subtract(tmp_path) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"warning: the result has no config.json, for {base} has none" in last
    (base / "config.json").write_text("{}")
    assert subtract(tmp_path, "--out", str(tmp_path / "other")) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_result_that_has_lost_a_shard_is_not_called_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path)
    assert subtract(tmp_path, "--max-shard-size", "20KB") == 0
    (tmp_path / "out/model-00003-of-00005.safetensors").unlink()
    capsys.readouterr()
    assert subtract(tmp_path, "--max-shard-size", "20KB") == 2
    told = capsys.readouterr()
    assert "model-00003-of-00005.safetensors is missing" in told.err and len(told.err.splitlines()) == 1
    assert told.out == ""


@pytest.fixture(params=["a pipe that nobody reads", "none"])
def deaf(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command with a standard output that takes nothing; a pipe says so at the first flush."""

    def run(*words: object) -> int:
        # Here, within the test: pytest sets stdout before each.
        with monkeypatch.context() as patch, ExitStack() as stack:
            stdout = stack.enter_context(broken_pipe()) if "pipe" in request.param else None
            patch.setattr(sys, "stdout", stdout)
            return main(["delta", *map(str, words)])

    return run


def broken_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def test_the_work_is_done_though_nobody_reads_what_is_said(tmp_path: Path, deaf: Callable[..., int]) -> None:
    base, tuned = write_pair(tmp_path)
    sources = ("--base", base, "--tuned", tuned)
    assert deaf("subtract", *sources, "--scale", "0.3", "--out", tmp_path / "out") == 0
    right = formula(load(base), load(tuned), 0.3)
    assert all(made.equal(right[name]) for name, made in load(tmp_path / "out").items())
    assert deaf("undo", tmp_path / "out", "--out", tmp_path / "back") == 0
    back = load(tmp_path / "back")
    assert all(back[name].equal(values) for name, values in load(base).items())


@pytest.mark.parametrize("num_strays", [1, 500])
def test_a_check_has_its_exit_code_though_nobody_reads_what_is_said(
    tmp_path: Path, deaf: Callable[..., int], num_strays: int
) -> None:
    write_pair(tmp_path)
    subtract(tmp_path)
    for number in range(num_strays):
        (tmp_path / f"out/stray-{number}.safetensors").touch()
    assert deaf("verify", tmp_path / "out") == 1


def test_a_narrow_result_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "base", layered(0))
    save(tmp_path / "tuned", nudged(layered(0), 1, std=1e-5))
    assert subtract(tmp_path, "--dtype", "same") == 0
    assert "warning: only" in capsys.readouterr().out


def test_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path)
    assert subtract(tmp_path, "--max-shard-size", "20KB", "--part", "2/2") == 0
    told = capsys.readouterr().out
    assert re.match(r"part 2/2 writes 2\d\.\d kB in 2 of 5 shards, 7\d\.\d kB in all \(float32; ", told)
    assert "left to other parts" in told
    assert subtract(tmp_path, "--max-shard-size", "20KB", "--part", "7/7") == 0
    assert "writes" not in capsys.readouterr().out
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
def test_mistakes_are_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
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
    told = capsys.readouterr().out
    assert "101x33" in told and "tensors, 35.4 kB: " in told


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


def test_verify_says_in_one_line_what_it_could_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path)
    subtract(tmp_path, "--max-shard-size", "20KB", "--part", "1/2")
    capsys.readouterr()
    assert main(["delta", "verify", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    assert told.startswith(f"{tmp_path / 'out'}: not finished, ") and told.count("\n") == 1
    assert "run the same command again" in told
    subtract(tmp_path, "--max-shard-size", "20KB", "--part", "2/2")
    (tmp_path / "tuned").rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["delta", "verify", str(tmp_path / "out")]) == 0
    said = (
        f"as it was written; not compared with its inputs: the tuned model {tmp_path / 'tuned'} is not there"
    )
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: {said}\n"


def test_undo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = write_pair(tmp_path)
    subtract(tmp_path)
    capsys.readouterr()
    assert main(["delta", "undo", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    back = load(tmp_path / "back")
    assert all(back[name].equal(values) for name, values in load(base).items())
    told = capsys.readouterr().out
    assert re.match(
        r"writes 36\.\d kB in 1 shard \(bfloat16; the result is float32, 71\.9 kB\); .* are free\n", told
    )
    assert "survival" not in told.splitlines()[-1]
    assert f"{len(back)} of {len(back)} tensors are the base's bit for bit" in told
