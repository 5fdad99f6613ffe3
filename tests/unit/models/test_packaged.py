"""Packaged models: names, places, and refusals; the real one is converted in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main
from pipeline.errors import InputError
from pipeline.models.packaged import PACKAGED, default_folder, fetch, resolve


def test_a_name_stands_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEARN_MODELS", str(tmp_path))
    assert resolve("someone/model") == "someone/model"
    with pytest.raises(InputError, match="run: flearn models fetch smollm2-135m"):
        resolve("smollm2-135m")
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").touch()
    assert resolve("smollm2-135m") == str(tmp_path / "smollm2-135m")
    assert fetch("smollm2-135m", default_folder("smollm2-135m")) is False


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="known: smollm2-135m"):
        fetch("gpt5", tmp_path / "out")


def test_never_into_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="holds something else"):
        fetch("smollm2-135m", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_file_than_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = PACKAGED["smollm2-135m"]._replace(module="a_forged_package")
    monkeypatch.setitem(PACKAGED, "smollm2-135m", packaged)
    package = tmp_path / "a_forged_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('a package is looked into, never imported')")
    (package / packaged.file).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="its sha256 is"):
        fetch("smollm2-135m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLEARN_MODELS", str(tmp_path))
    assert main(["models", "list"]) == 0
    assert "flearn models fetch smollm2-135m" in capsys.readouterr().out
    assert main(["models", "fetch", "gpt5"]) == 2
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").touch()
    assert main(["models", "fetch", "smollm2-135m"]) == 0
    assert f"{tmp_path / 'smollm2-135m'}: already there" in capsys.readouterr().out
