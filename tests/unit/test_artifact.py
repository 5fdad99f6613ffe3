"""Artifacts: complete means the manifest is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.artifact import Artifact, fingerprint, write_json, write_text
from pipeline.errors import InputError


def test_complete_is_the_manifest(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "learn-1")
    assert not artifact.is_complete
    with pytest.raises(InputError, match="has not finished"):
        artifact.manifest  # noqa: B018
    artifact.commit({"result": {"model": "hub/name"}, "inputs": {"model": "teach-2"}})
    assert artifact.is_complete
    assert artifact.model_path == "hub/name"
    assert artifact.input("model").folder == tmp_path / "teach-2"
    artifact.commit({"result": {}, "inputs": {"model": str(tmp_path / "other" / "teach-2")}})
    assert Artifact(artifact.folder).input("model").folder == tmp_path / "other" / "teach-2"
    assert [p.name for p in artifact.folder.iterdir()] == ["manifest.json"]


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        Artifact(tmp_path).manifest  # noqa: B018


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_fingerprint_depends_on_each_part() -> None:
    base = fingerprint("learn", 1, {"lr": 0.1}, {"model": "a"})
    assert base == fingerprint("learn", 1, {"lr": 0.1}, {"model": "a"})
    others = [("teach", 1, {"lr": 0.1}, {"model": "a"}), ("learn", 2, {"lr": 0.1}, {"model": "a"})]
    others += [("learn", 1, {"lr": 0.2}, {"model": "a"}), ("learn", 1, {"lr": 0.1}, {"model": "b"})]
    assert base not in {fingerprint(*other) for other in others}
