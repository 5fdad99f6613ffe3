"""Each finding, raised by a run that deserves it and by no run that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

MakeResults = Callable[..., dict[str, Any]]

SOUND: dict[str, Any] = {
    "num_records": 120,
    "methods": ["full_ft", "flearn_ft"],
    "protocols": ["token", "generation"],
    "minds": {
        ("updated", "full_ft"): (0.7, 0.2),
        ("updated", "flearn_ft"): (0.97, 0.0),
        ("forgotten", "flearn_ft"): (0.0, 0.3, 0.9),
    },
}
"""A run that nothing is wrong with."""


def changed(**minds: tuple[float, ...]) -> dict[str, Any]:
    """SOUND with another `original`, `forgotten` or `updated` model."""
    methods = {"original": None, "forgotten": "flearn_ft", "updated": "flearn_ft"}
    return SOUND | {
        "minds": SOUND["minds"] | {(state, methods[state]): mind for state, mind in minds.items()}
    }


def test_a_sound_run_has_no_findings(make_results: MakeResults) -> None:
    assert make_results(**SOUND)["warnings"] == []


def survival(projection: float | None, norm_ratio: float | None) -> dict[str, Any]:
    """SOUND, stored less exactly."""
    return SOUND | {
        "survival": {"share_changed": 0.5, "projection": projection, "cosine": 0.5, "norm_ratio": norm_ratio}
    }


def warning(stage: str, text: str) -> dict[str, Any]:
    """SOUND, with a warning by every step of `stage`."""
    return SOUND | {"warnings": {stage: [text]}}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (changed(original=(0.0, 0.3)), "The original model knew only "),
        (
            changed(forgotten=(0.0, 0.97, 0.9)),
            "F-Learning_FT: subtracting with lambda 0.3 did not lower the old answers' score",
        ),
        (
            changed(forgotten=(0.0, 0.1, 0.2)),
            "most unrelated answers have changed (free generation, unchanged: F-Learning_FT",
        ),
        (
            changed(updated=(0.97, 0.0, 0.2)),
            "After the update, most unrelated answers have changed (token accuracy, unchanged: F-Learning_FT",
        ),
        (SOUND | {"generality": 0.3}, "The new answers are recited rather than known"),
        (
            changed(updated=(0.72, 0.0)),
            "F-Learning_FT is not measurably better than Full-FT in free generation: reliability",
        ),
        (changed(updated=(0.2, 0.0)), "F-Learning_FT is worse than Full-FT in free generation: reliability"),
        (
            changed(updated=(0.5, 0.0)) | {"token_bonus": 0.5},
            "Token accuracy flatters: far fewer of the free answers are the new",
        ),
        (
            SOUND | {"num_records": 99},
            "Few records (reliability 99, generality 99, locality 99, old answers 99)",
        ),
        (survival(0.7, 0.9), "F-Learning_FT: rounding to the stored type kept only 70%"),
        (survival(1.0, 8.0), "F-Learning_FT: the stored change is 8.0 times"),
        (warning("facts", "3 of 9 facts contradict another"), "facts: 3 of 9 facts contradict another"),
        (warning("evaluate", "no portability"), "evaluate, 5 steps: no portability"),
        (warning("forget", "a tensor did not change"), "subtract: F-Learning_FT: a tensor did not change"),
    ],
)
def test_finding_is_raised(make_results: MakeResults, run: dict[str, Any], expected: str) -> None:
    warnings = make_results(**run)["warnings"]
    assert [text for text in warnings if expected in text], warnings
    assert len(set(warnings)) == len(warnings)


@pytest.mark.parametrize(
    ("run", "unexpected"),
    [
        # The margins' other sides.
        (changed(original=(0.0, 0.7)), "knew only"),
        (changed(forgotten=(0.0, 0.7, 0.9)), "did not lower"),
        (changed(forgotten=(0.0, 0.1, 0.7)), "most unrelated"),
        (changed(updated=(0.97, 0.0, 0.7)), "most unrelated"),
        (SOUND | {"generality": 0.7}, "recited"),
        (SOUND | {"num_records": 100}, "Few records"),
        # The forget stage warns of this itself.
        (survival(0.1, 0.1), "rounding to the stored"),
        # No change was intended: nothing to compare.
        (survival(None, None), "rounding"),
    ],
)
def test_finding_is_not_raised(make_results: MakeResults, run: dict[str, Any], unexpected: str) -> None:
    assert [text for text in make_results(**run)["warnings"] if unexpected in text] == []


def test_without_its_baseline_a_method_is_not_compared(make_results: MakeResults) -> None:
    results = make_results(**changed(updated=(0.2, 0.0)) | {"methods": ["flearn_ft"]})
    assert [text for text in results["warnings"] if "better than" in text or "worse than" in text] == []


def test_all_right_twice_is_not_better(make_results: MakeResults) -> None:
    # Every record equal: a standard error of 0 must not make a difference of one record significant.
    run = changed(updated=(1.0, 0.0), original=(0.0, 1.0)) | {"methods": ["full_ft", "flearn_ft"]}
    run["minds"][("updated", "full_ft")] = (1.0, 0.0)
    assert [text for text in make_results(**run)["warnings"] if "not measurably better than Full-FT" in text]
