"""An output folder that another recipe began: it may be taken over where nothing is finished and nobody is at work."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_models import load, save, write_pair

from pipeline.delta import subtract as module
from pipeline.delta.disk import OutputFile
from pipeline.delta.subtract import subtract
from pipeline.errors import InputError

SHARD = 20_000
LITTER = ".model-00004-of-00009.safetensors.abcd1234.tmp"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """base, tuned, and what becomes of them with two scales."""
    base, tuned = write_pair(tmp_path)
    for scale in (0.3, 0.4):
        subtract(base, tuned, scale, tmp_path / f"{scale}", max_shard_size=SHARD)
    return tmp_path


def begin(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where a worker with scale 0.2 died in its second shard, and before it noted the first: no shard is finished."""

    class Failing(OutputFile):
        def __init__(self, path: Path, *rest: Any) -> None:
            if "00002" in path.name:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            super().__init__(path, *rest)

    out = models / "out"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(module, "OutputFile", Failing)
        subtract(models / "base", models / "tuned", 0.2, out, max_shard_size=19_000, memory="16MiB")
    for receipt in out.glob(".incomplete/*.json"):
        receipt.unlink()
    (out / LITTER).write_bytes(b"half of it")
    assert any(out.glob("*.safetensors"))
    return out


def at_once(works: list[Callable[[], object]]) -> list[BaseException]:
    failures: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_a_dead_claim_without_a_finished_shard_is_taken_over(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = begin(models, monkeypatch)
    assert subtract(models / "base", models / "tuned", 0.3, out, max_shard_size=SHARD).state == "written"
    assert contents(out) == contents(models / "0.3")


def test_a_base_that_held_nan_may_be_corrected(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    right = load(base)
    save(base, right | {"model.norm.weight": torch.full_like(right["model.norm.weight"], torch.nan)})
    with pytest.raises(InputError, match="NaN"):
        subtract(base, tuned, 0.3, tmp_path / "out")
    save(base, right)
    assert subtract(base, tuned, 0.3, tmp_path / "out").state == "written"
    subtract(base, tuned, 0.3, tmp_path / "new")
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_too_little_room_leaves_the_dead_claim(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = begin(models, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="are free"):
        patch.setattr("pipeline.weights.writer.free_bytes", lambda folder: 1000)
        subtract(models / "base", models / "tuned", 0.3, out, max_shard_size=SHARD)
    assert list(contents(out)) == [".incomplete/lock", ".incomplete/recipe/recipe.json"]


def test_a_living_worker_keeps_its_claim(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before it has finished, or even opened, its first shard."""
    refused: list[str] = []

    class Intruded(OutputFile):
        def __init__(self, path: Path, *rest: Any) -> None:
            if not refused:
                refused.append("")
                with pytest.raises(InputError) as caught:
                    subtract(models / "base", models / "tuned", 0.4, models / "out", max_shard_size=SHARD)
                refused.append(str(caught.value))
            super().__init__(path, *rest)

    monkeypatch.setattr(module, "OutputFile", Intruded)
    subtract(models / "base", models / "tuned", 0.3, models / "out", max_shard_size=SHARD)
    assert "holds an unfinished result of another recipe (scale 0.3 instead of 0.4)" in refused[1]
    assert contents(models / "out") == contents(models / "0.3")


@pytest.mark.parametrize("attempt", range(5))
def test_parts_take_a_dead_claim_over_together(models: Path, monkeypatch: pytest.MonkeyPatch, attempt: int) -> None:
    out = begin(models, monkeypatch)

    def work(i: int) -> Callable[[], object]:
        return lambda: subtract(models / "base", models / "tuned", 0.3, out, max_shard_size=SHARD, part=(i, 3))

    assert at_once([work(i) for i in (1, 2, 3, 1, 2, 3)]) == []
    assert contents(out) == contents(models / "0.3")


@pytest.mark.parametrize("attempt", range(5))
def test_of_two_recipes_at_a_dead_claim_one_wins(models: Path, monkeypatch: pytest.MonkeyPatch, attempt: int) -> None:
    out = begin(models, monkeypatch)
    winners: list[float] = []

    def work(scale: float) -> None:
        subtract(models / "base", models / "tuned", scale, out, max_shard_size=SHARD)
        winners.append(scale)

    failures = at_once([partial(work, scale) for scale in (0.3, 0.4, 0.3, 0.4)])
    assert len(set(winners)) == 1 and len(winners) == 2
    assert all(isinstance(error, InputError) and "of another recipe" in str(error) for error in failures)
    assert contents(out) == contents(models / f"{winners[0]}")


def test_without_locks_nothing_is_taken_over(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a living worker could not be told from a dead one."""

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    out = begin(models, monkeypatch)
    monkeypatch.setattr(fcntl, "flock", refuse)
    before = contents(out)
    with pytest.raises(InputError, match="of another recipe"):
        subtract(models / "base", models / "tuned", 0.3, out, max_shard_size=SHARD)
    assert contents(out) == before
    assert subtract(models / "base", models / "tuned", 0.3, models / "new", max_shard_size=SHARD).state == "written"
