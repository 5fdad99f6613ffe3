"""Checkpoints: only a whole one counts, a new one never costs the old one, leftovers of a killed save are
removed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.context import Context
from pipeline.errors import InputError, full_disk_message
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.zero_engine import ZeroEngine


class Engine(ZeroEngine):
    """Saves and loads like the real one, but small."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.loaded = ""

    def save(self, folder: Path, tag: str, with_moments: bool) -> None:
        path = folder / tag
        path.mkdir(parents=True)
        (path / "model.pt").write_bytes(b"weights")
        if self.fails:
            raise OSError(28, "No space left on device")
        (path / "optim.pt").write_bytes(b"moments")

    def load(self, folder: Path, tag: str) -> int | None:
        self.loaded = tag
        return int(tag.partition("-")[2]) if (folder / tag).is_dir() else None


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", Context())


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_a_new_one_replaces_the_old_one(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None
    for step in (2, 10):
        checkpoints.save(Engine(), step)
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 10
    assert names(checkpoints) == ["step-00000010"]


def test_a_failed_save_leaves_the_old_one_and_is_removed_by_the_next_run(checkpoints: Checkpoints) -> None:
    checkpoints.save(Engine(), 2)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(Engine(fails=True), 4)
    assert names(checkpoints) == ["step-00000002", "step-00000004"]
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 2
    assert names(checkpoints) == ["step-00000002"]


def test_a_full_disk_is_called_that(checkpoints: Checkpoints) -> None:
    class Full(Engine):
        def save(self, folder: Path, tag: str, with_moments: bool) -> None:
            torch.save({"weights": torch.zeros(1 << 20)}, "/dev/full")

    with pytest.raises(OSError, match="No space left on device") as raised:
        checkpoints.save(Full(), 2)
    assert full_disk_message(raised.value)


@pytest.mark.parametrize("damage", ["shorter", "missing"])
def test_a_damaged_one_does_not_count(checkpoints: Checkpoints, damage: str) -> None:
    saved = checkpoints.save(Engine(), 2)
    if damage == "shorter":
        (saved.folder / "optim.pt").write_bytes(b"mom")
    else:
        (saved.folder / "optim.pt").unlink()
    assert checkpoints.latest() is None


def test_loading(checkpoints: Checkpoints) -> None:
    engine = Engine()
    saved = checkpoints.save(engine, 7)
    checkpoints.load(engine, saved)
    assert engine.loaded == "step-00000007"
    with pytest.raises(InputError, match=r"saved by 1 ranks, but this run has 2; set cluster.ranks=1"):
        Checkpoints(checkpoints.folder, Context(world_size=2)).load(engine, saved)
    checkpoints.remove()
    with pytest.raises(RuntimeError, match="did not load"):
        checkpoints.load(engine, saved)
    assert not checkpoints.folder.exists()
