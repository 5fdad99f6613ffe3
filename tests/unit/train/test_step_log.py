"""The step log goes on where the checkpoint was, whatever a killed run left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.train.step_log import Step, StepLog, read_steps, summarise


def step(number: int, loss: float = 1.0, tokens: int = 10, rate: float = 5.0) -> Step:
    return Step(number, 1, loss, 1e-3, 0.5, tokens, rate)


def test_one_json_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    with StepLog(path) as log:
        log.open(0)
        log.write(step(1, loss=2.5))
        log.write(step(2))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert set(rows[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second"}
    assert read_steps(path)[0] == step(1, loss=2.5)


def test_resuming_drops_what_came_after_the_checkpoint_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    with StepLog(path) as log:
        log.open(0)
        for number in range(1, 6):
            log.write(step(number))
    with path.open("a") as file:
        file.write('{"step": 6, "ep')
    with StepLog(path) as log:
        log.open(3)
        log.write(step(4, loss=0.25))
    assert [(s.step, s.loss) for s in read_steps(path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 0.25)]


def test_summary() -> None:
    facts = summarise([step(1, 3.0, tokens=10, rate=5.0), step(2, 1.0, tokens=30, rate=10.0)])
    assert facts == {
        "first_loss": 3.0,
        "final_loss": 1.0,
        "tokens": 40,
        "tokens_per_second": pytest.approx(8.0),
    }
