"""A worker that is overtaken: at each moment in turn, another one does the whole subtraction before this one
goes on.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from delta_models import layered, nudged, save

from pipeline.delta.subtract import subtract
from pipeline.errors import InputError

MOMENTS = [
    (io, "open"),
    *((os, name) for name in ("scandir", "mkdir", "rename", "replace", "unlink", "rmdir")),
]
"""The functions by which a worker sees or changes what the other sees: before each call of one is a
moment.
"""

OPTIONS: dict[str, Any] = {"max_shard_size": 20_000, "memory": "16MiB"}
"""The memory is enough for one thread: the calls come in one order."""


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def at_call(
    number: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]
) -> bool:
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
