"""Learning rates at the ends and in the middle of each schedule."""

from __future__ import annotations

import pytest

from pipeline.train.schedule import learning_rate


def rates(schedule: str, warmup: float, num_steps: int = 10) -> list[float]:
    return [learning_rate(step, num_steps, 1.0, schedule, warmup) for step in range(num_steps)]  # type: ignore[arg-type]


def test_constant_is_constant() -> None:
    assert rates("constant", 0.0) == [1.0] * 10


def test_linear_falls_by_equal_steps_to_nearly_zero() -> None:
    assert rates("linear", 0.0) == pytest.approx([1 - 0.1 * step for step in range(10)])


def test_cosine_begins_at_the_peak_and_is_half_way_in_the_middle() -> None:
    values = rates("cosine", 0.0)
    assert values[0] == 1.0 and values[5] == pytest.approx(0.5) and 0 < values[9] < 0.03


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_to_the_peak_and_no_step_has_rate_zero(schedule: str) -> None:
    values = rates(schedule, 0.3)
    assert values[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert all(value > 0 for value in values)


def test_warmup_over_all_steps() -> None:
    assert rates("cosine", 1.0)[-1] == 1.0
