"""A worker that is overtaken: at each moment in turn, another one does the whole subtraction before this one goes on."""

from __future__ import annotations

import fcntl
import io
import os
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from delta_models import layered, nudged, save

from pipeline.artifact import write_json
from pipeline.delta.journal import Journal
from pipeline.delta.presence import Presence
from pipeline.delta.subtract import subtract
from pipeline.errors import InputError

MOMENTS = [(io, "open"), (fcntl, "flock"), *((os, name) for name in ("scandir", "mkdir", "rename", "replace", "unlink", "rmdir"))]
"""The functions by which a worker sees or changes what the other sees: before each call of one is a moment."""

OPTIONS: dict[str, Any] = {"max_shard_size": 20_000, "memory": "16MiB"}
"""The memory is enough for one thread: the calls come in one order."""


DEAD = {"version": 0}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def at_call(number: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Do `work`, and `action` before the call of that number, from 0; False if it makes fewer."""
    numbers = count()
    is_done = False

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal is_done
            if not is_done and next(numbers) == number:
                is_done = True
                action()
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for module, name in MOMENTS:
            patch.setattr(module, name, wrapped(getattr(module, name)))
        work()
    return is_done


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base = layered(0, num_layers=1)
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", nudged(base, 1))
    for scale in (0.3, 0.4):
        subtract(tmp_path / "base", tmp_path / "tuned", scale, tmp_path / f"{scale}", **OPTIONS)
    return tmp_path


@pytest.mark.slow
def test_by_one_of_the_same_recipe(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = contents(models / "0.3")
    for number in count():
        out = models / f"out-{number}"
        states: list[str] = []

        def work(out: Path = out, states: list[str] = states) -> None:
            states.append(subtract(models / "base", models / "tuned", 0.3, out, **OPTIONS).state)

        if not at_call(number, work, monkeypatch, work):
            break
        assert "written" in states and set(states) <= {"written", "found"}, number
        assert contents(out) == right, number
    assert number > 50, "too few moments were seen"


def test_by_one_of_another_recipe(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes too late is refused, and the other's result is whole."""
    winners: list[float] = []
    is_over = False
    while not is_over:
        out = models / f"out-{len(winners)}"

        def work(scale: float, out: Path = out) -> None:
            try:
                subtract(models / "base", models / "tuned", scale, out, **OPTIONS)
            except InputError as error:
                assert "of another recipe" in str(error)
            else:
                winners.append(scale)

        num_before = len(winners)
        is_over = not at_call(num_before, lambda: work(0.4), monkeypatch, lambda: work(0.3))
        assert len(winners) == num_before + 1
        assert contents(out) == contents(models / f"{winners[-1]}"), num_before
    assert winners[0] == 0.4 and winners.count(0.3) > 40, "too few moments were seen"


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 0.4])
def test_while_it_clears_away_what_a_dead_one_began(models: Path, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """By one of the same recipe or of another, which may have to wait for it."""
    winners: list[float] = []
    refused: list[str] = []

    def work(scale: float, out: Path) -> None:
        try:
            subtract(models / "base", models / "tuned", scale, out, **OPTIONS)
            winners.append(scale)
        except InputError as error:
            refused.append(str(error))

    for number in count():
        out = models / f"out-{number}"
        begin_and_die(models, out)
        other = threading.Thread(target=work, args=(scale, out))

        def overtake(other: threading.Thread = other) -> None:
            other.start()
            other.join(0.2)

        if not at_call(number, overtake, monkeypatch, partial(work, 0.3, out)):
            break
        other.join()
        assert len(winners) == (2 if scale == 0.3 else 1), (number, refused)
        assert all("of another recipe" in message for message in refused), (number, refused)
        assert contents(out) == contents(models / f"{winners[0]}"), number
        winners.clear()
    assert number > 50, "too few moments were seen"


def test_by_one_that_clears_away_what_a_dead_one_began_and_dies(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = contents(models / "0.3")
    for number in count():
        out = models / f"out-{number}"
        begin_and_die(models, out)

        def clear_away(out: Path = out) -> None:
            with closing(Presence(out / ".incomplete")) as presence:
                if Journal(out).recipe == DEAD and presence.is_alone():
                    for path in [*out.glob("*model*"), *out.glob(".incomplete/recipe/*")]:
                        path.unlink()
                    (out / ".incomplete/recipe").rmdir()

        if not at_call(number, clear_away, monkeypatch, partial(subtract, models / "base", models / "tuned", 0.3, out, **OPTIONS)):
            break
        assert contents(out) == right, number
    assert number > 50, "too few moments were seen"


def begin_and_die(models: Path, out: Path) -> None:
    """As one of a third recipe does that is killed before it has noted its first shard, and while it writes the second."""
    write_json(out / ".incomplete/recipe/recipe.json", DEAD)
    for name in ("model-00001-of-00003.safetensors", ".model-00002-of-00003.safetensors.abcd1234.tmp"):
        (out / name).write_bytes(b"some of it")
