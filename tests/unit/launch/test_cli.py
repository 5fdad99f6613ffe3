"""How a command ends on errors: one line for what the system refuses, a traceback for a mistake of ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from delta_models import layered, save, write_pair

from launch.cli import COMMANDS, main

ROOT = Path(__file__).parents[3]
REFUSALS = [errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES]


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/model")


def inspecting(monkeypatch: pytest.MonkeyPatch, error: Exception) -> int:
    """The exit code of a command at whose work `error` is raised."""

    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("launch.commands.delta.inspect", fail)
    return main(["delta", "inspect", "model"])


@pytest.mark.parametrize("number", REFUSALS)
def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    assert inspecting(monkeypatch, refusal(number)) == 2
    assert capsys.readouterr().err == f"flearn: /data/model: {os.strerror(number)}\n"


@pytest.mark.parametrize(
    "error", [OSError("no model named so"), OSError(errno.EBADF, "Bad"), ValueError("x"), KeyError("x")]
)
def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(type(error)):
        inspecting(monkeypatch, error)


def test_a_full_disk_gives_advice_for_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspecting(monkeypatch, refusal(errno.ENOSPC)) == 2
    told = capsys.readouterr().err
    assert (
        "no space left on the disk while writing /data/model: free some space and run the same command again"
        in told
    )
    assert "--out" in told and "cluster.runs_dir" in told and told.count("\n") == 1


@pytest.mark.parametrize("option", ["--out", "--tuned"])
@pytest.mark.parametrize("place", ["/proc/foo/x", "x" * 300])
def test_places_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, place: str
) -> None:
    base, tuned = write_pair(tmp_path)
    words = ["--base", str(base), "--tuned", str(tuned), "--out", str(tmp_path / "out"), "--scale", "0.3"]
    assert main(["delta", "subtract", *words, option, str(tmp_path / place)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("flearn: /") and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_models_that_differ_in_many_tensors_are_said_to_do_so_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save(tmp_path / "base", layered(0, num_layers=9))
    tuned = save(tmp_path / "tuned", layered(0, num_layers=3))
    words = ["--base", str(base), "--tuned", str(tuned), "--out", str(tmp_path / "out"), "--scale", "1"]
    assert main(["delta", "subtract", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "flearn: base and tuned model do not fit"
        " (18 problems; give a model and a fine-tuning of that very model): "
    )
    assert told.count("is missing from the tuned model") == 18


def test_every_file_of_commands_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    files = {path.stem for path in (ROOT / "launch/commands").glob("*.py")} - {"__init__"}
    assert COMMANDS.keys() == files
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: flearn {name} ")


@pytest.mark.parametrize("words", [[], ["rum"], ["--version"]])
def test_what_is_no_command_lists_the_commands(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: flearn [-h] COMMAND" in capsys.readouterr().err
