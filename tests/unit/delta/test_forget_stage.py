"""The `forget` stage, asked to stop: by a real signal in the middle of its work, and before it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from delta_models import formula, layered, load, nudged, save

from pipeline.artifact import Artifact, write_json
from pipeline.config import Forget
from pipeline.context import Context, Preempted
from pipeline.delta import stage as forget
from pipeline.errors import InputError
from pipeline.weights import stream
from pipeline.weights.io.direct import PAGE
from pipeline.weights.journal import missing_parts

NUM_LAYERS = 20
"""Of a shard each: more than the threads that may be at work when the warning comes."""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", PAGE)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    """A model in many shards, and what a fine-tuning made of it."""
    base = layered(0, num_layers=NUM_LAYERS)
    for folder, tensors in (("base", base), ("tuned", nudged(base, 1))):
        save(tmp_path / folder / "model", tensors)
        write_json(
            tmp_path / folder / "manifest.json", {"result": {"model": "model", "model_kind": "folder"}}
        )
    return {role: Artifact(tmp_path / role) for role in ("base", "tuned")}


@pytest.fixture
def context() -> Iterator[Context]:
    """One that hears signals."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    context = Context()
    context.listen()
    yield context
    for number, handler in before.items():
        signal.signal(number, handler)


def run(inputs: dict[str, Artifact], out: Path, context: Context) -> dict[str, Any] | None:
    section = {"forget": Forget(scale=0.3, max_shard_size="10KB").model_dump(mode="json"), "seed": 0}
    return forget.run(section, inputs, out, context)


def whole(out: Path) -> dict[Path, int]:
    """Shards that are done, and when."""
    return {path: path.stat().st_mtime_ns for path in out.glob("model/*.safetensors")}


def warn_after(num_shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGUSR2 when so many shards are in place. No thread begins another before the stage has given up:
    only then does it join the threads without a time limit.
    """
    gave_up = threading.Event()
    numbers = count(1)
    replace, join = os.replace, threading.Thread.join

    def replace_and_hold(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).suffix != ".safetensors":
            return
        number = next(numbers)
        if number == num_shards:
            os.kill(os.getpid(), signal.SIGUSR2)
        if number >= num_shards:
            assert gave_up.wait(60), "the warning was not heeded"

    def join_and_release(thread: threading.Thread, timeout: float | None = None) -> None:
        if timeout is None:
            gave_up.set()
        join(thread, timeout)

    monkeypatch.setattr(os, "replace", replace_and_hold)
    monkeypatch.setattr(threading.Thread, "join", join_and_release)


def test_a_warning_in_the_middle_loses_no_shard_that_is_done(
    inputs: dict[str, Artifact], context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    warn_after(3, monkeypatch)
    with pytest.raises(Preempted, match="the shards that are done are kept"):
        run(inputs, out, context)
    before = whole(out)
    assert 3 <= len(before) < NUM_LAYERS
    assert not (out / "model/manifest.json").exists()
    assert run(inputs, out, Context()) is not None
    after = whole(out)
    assert {path: after[path] for path in before} == before
    right = formula(load(tmp_path / "base/model"), load(tmp_path / "tuned/model"), 0.3)
    assert all(values.equal(right[name]) for name, values in load(out / "model").items())


def test_what_was_finished_is_found_again_and_what_was_lost_since_is_named(
    inputs: dict[str, Artifact], context: Context, tmp_path: Path
) -> None:
    """A stage that is killed before its own manifest runs once more."""
    facts = run(inputs, tmp_path / "out", context)
    assert run(inputs, tmp_path / "out", context) == facts is not None
    lost = sorted(whole(tmp_path / "out"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=f"{lost.name} is missing; .* delete {tmp_path / 'out/model'}"):
        run(inputs, tmp_path / "out", context)


def test_the_log_says_the_sizes_once(
    inputs: dict[str, Artifact], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flearn")
    for _ in range(2):
        run(inputs, tmp_path / "out", Context())
    (said,) = [record.getMessage() for record in caplog.records if "writes" in record.getMessage()]
    assert said.startswith("forget: writes ") and "shards (float32; the base is bfloat16, " in said


def test_a_part_that_was_stopped_is_still_missing(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(inputs, out, Context(part=(0, 2))) is None
    stopped = Context(part=(1, 2))
    stopped.stop = True
    with pytest.raises(Preempted):
        run(inputs, out, stopped)
    assert missing_parts(out, 2) == [(1, 2)]
    assert run(inputs, out, Context(part=(1, 2))) is not None
