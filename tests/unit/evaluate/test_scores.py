"""Means, counts, standard errors, and the split by what the original model knew."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.evaluate.scores import (
    METRICS,
    aggregate,
    harmonic_mean,
    mean,
    split_by_known,
    standard_error,
)


def row(
    identifier: str, protocol: str = "token", knows: bool | None = None, **scores: float | None
) -> dict[str, Any]:
    return {
        "id": identifier,
        "knows_old": knows,
        protocol: {"scores": {**dict.fromkeys(METRICS[protocol]), **scores}},
    }


def test_mean_count_and_standard_error_are_over_the_records_that_have_the_score() -> None:
    rows = [
        row("a", reliability=1.0, leakage=0.0),
        row("b", reliability=0.5),
        row("c", reliability=0.0),
        row("d", reliability=0.5),
    ]
    scores = aggregate(rows, ["token"])["token"]
    assert (scores["reliability"], scores["counts"]["reliability"]) == (0.5, 4)
    assert scores["stderr"]["reliability"] == pytest.approx((0.5 / 3) ** 0.5 / 2)
    assert (scores["leakage"], scores["counts"]["leakage"], scores["stderr"]["leakage"]) == (0.0, 1, None)
    assert (scores["locality"], scores["counts"]["locality"], scores["stderr"]["locality"]) == (None, 0, None)


def test_s_is_the_harmonic_mean_of_the_three_rates() -> None:
    rows = [
        row("a", "probability", reliability=1.0, generality=0.5, locality=1.0),
        row("b", "probability", reliability=1.0, generality=0.5, locality=0.0),
    ]
    assert aggregate(rows, ["probability"])["probability"]["S"] == pytest.approx(3 / (1 + 2 + 2))
    assert aggregate([row("a", "probability", reliability=1.0)], ["probability"])["probability"]["S"] is None
    assert harmonic_mean([1.0, 0.0]) == 0
    assert harmonic_mean([]) is None


def test_no_records() -> None:
    assert mean([]) is None
    assert standard_error([0.5]) is None
    assert aggregate([], ["token", "probability"])["token"]["reliability"] is None


def test_the_split_follows_the_original_and_leaves_facts_without_an_old_answer_out() -> None:
    original = [row("a", knows=True), row("b", knows=False), row("c", knows=None), row("d", knows=True)]
    rows = [
        row("a", reliability=1.0),
        row("b", reliability=0.0),
        row("c", reliability=0.0),
        row("d", reliability=0.5, knows=False),
    ]
    split = split_by_known(rows, original, ["token"])
    known, unknown = split["known"], split["unknown"]
    assert (known["num_known"], known["num_records"], unknown["num_records"]) == (2, 3, 1)
    assert known["protocols"]["token"]["reliability"] == 0.75
    assert unknown["protocols"]["token"]["reliability"] == 0
