"""An evaluation by two ranks ends with what one rank finds, undisturbed, killed, or asked to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from halts import Halt, environment

from pipeline.artifact import Artifact
from pipeline.evaluate import record_files
from pipeline.facts.fact import Fact, Probe, write_facts

ROOT = Path(__file__).parents[2]
NUM_FACTS = 41
ROUND = 2
"""Facts that a rank asks between two moments at which it may stop, with the worker's batches of one."""

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


def start(folder: Path, out: Path, ranks: int, *halts: Halt) -> list[subprocess.Popen[bytes]]:
    out.mkdir(exist_ok=True)
    meeting = Path(tempfile.mkdtemp(dir=out.parent)) / "meeting"
    shared = os.environ | environment(*halts)
    shared["PYTHONPATH"] += os.pathsep + str(ROOT)
    shared |= {"MEETING": str(meeting), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/integration/evaluate_worker.py"), str(folder), str(out)]
    return [subprocess.Popen(command, env=shared | {"RANK": str(rank)}) for rank in range(ranks)]


def codes(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(timeout=300) for process in processes]


def result(out: Path) -> tuple[Any, list[Any]]:
    """The stage's result and its rows; log-likelihoods rounded, for their last bits depend on the batch."""
    rows = json.loads(json.dumps(record_files.read_rows(out)), parse_float=lambda text: round(float(text), 4))
    return json.loads((out / "result.json").read_text()), rows


def third_round(tmp_path: Path, rank: int) -> Halt:
    """Where this rank is about to write the rows of its third round."""
    return Halt(tmp_path / f"halt-{rank}", f"*/records-rank{rank}.jsonl", number=3)


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
    halts = [third_round(tmp_path, rank) for rank in (0, 1)]
    processes = start(folder, out, 2, *halts)
    for halt in halts:
        halt.wait(lambda: all(process.poll() is None for process in processes))
    for process in processes:
        process.kill()
    codes(processes)
    assert len(record_files.recover(out)) == 2 * 2 * ROUND
    assert codes(start(folder, out, 1)) == [0]
    assert result(out) == undisturbed


def test_one_rank_is_asked_to_stop_and_both_do(folder: Path, tmp_path: Path, undisturbed: Any) -> None:
    out = tmp_path / "stopped"
    halt = third_round(tmp_path, 1)
    processes = start(folder, out, 2, halt)
    halt.wait(lambda: all(process.poll() is None for process in processes))
    processes[1].send_signal(signal.SIGTERM)
    assert codes(processes) == [3, 3]
    assert len(record_files.recover(out)) == 2 * 3 * ROUND
    assert codes(start(folder, out, 1)) == [0]
    assert result(out) == undisturbed
