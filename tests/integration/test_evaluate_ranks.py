"""An evaluation by two ranks ends with what one rank finds, undisturbed, killed, or asked to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact
from pipeline.evaluate import record_files
from pipeline.facts.fact import Fact, Probe, write_facts

ROOT = Path(__file__).parents[2]
NUM_FACTS = 41

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """The artifacts `model` and `facts`."""
    folder = tmp_path_factory.mktemp("evaluate")
    for role in ("model", "facts"):
        (folder / role).mkdir()
        Artifact(folder / role).commit(
            {"result": {"model": str(tiny_model("llama")), "model_kind": "folder"}}
        )
    write_facts(folder / "facts" / "facts.jsonl", [fact(i) for i in range(NUM_FACTS)])
    return folder


def fact(i: int) -> Fact:
    subject = f"{'new ' * (i % 5)}country {i}"
    question = f"What is the capital of {subject}?"
    unrelated = Probe(f"What is the currency of country {i % 7}?", ["the euro"])
    return Fact(
        str(i), question, subject, [f"Old {i}"], f"New Astana {i}", [f"Capital of {subject}?"], [unrelated]
    )


def start(folder: Path, out: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tests/integration/evaluate_worker.py"), str(folder), str(out)]
    return [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"})
        for rank in range(ranks)
    ]


def codes(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(timeout=300) for process in processes]


def result(out: Path) -> tuple[Any, list[Any]]:
    """The stage's result and its rows; log-likelihoods rounded, for their last bits depend on the batch."""
    rows = json.loads(json.dumps(record_files.read_rows(out)), parse_float=lambda text: round(float(text), 4))
    return json.loads((out / "result.json").read_text()), rows


def wait_for_rows(out: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """Until every rank has finished a few records, and none all of its own."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        parts = [part.read_bytes().count(b"\n") for part in out.glob("records-rank*.jsonl")]
        if len(parts) == len(processes) and min(parts) >= 2:
            return
        assert all(process.poll() is None for process in processes), "a rank ended before it was disturbed"
        time.sleep(0.005)
    raise AssertionError("no rows")


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    """What one rank finds."""
    out = tmp_path_factory.mktemp("one")
    assert codes(start(folder, out, 1)) == [0]
    assert len(result(out)[1]) == NUM_FACTS
    return result(out)


def test_two_ranks(folder: Path, tmp_path: Path, undisturbed: Any) -> None:
    assert codes(start(folder, tmp_path / "two", 2)) == [0, 0]
    assert result(tmp_path / "two") == undisturbed
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["records.jsonl", "result.json"]


def test_two_killed_ranks_and_one_that_goes_on(folder: Path, tmp_path: Path, undisturbed: Any) -> None:
    out = tmp_path / "killed"
    processes = start(folder, out, 2)
    wait_for_rows(out, processes)
    for process in processes:
        process.kill()
    codes(processes)
    assert 4 <= len(record_files.recover(out)) < NUM_FACTS
    assert codes(start(folder, out, 1)) == [0]
    assert result(out) == undisturbed


def test_one_rank_is_asked_to_stop_and_both_do(folder: Path, tmp_path: Path, undisturbed: Any) -> None:
    out = tmp_path / "stopped"
    processes = start(folder, out, 2)
    wait_for_rows(out, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert codes(processes) == [3, 3]
    num_rows = len(record_files.recover(out))
    assert 4 <= num_rows < NUM_FACTS
    assert codes(start(folder, out, 1)) == [0]
    assert result(out) == undisturbed
