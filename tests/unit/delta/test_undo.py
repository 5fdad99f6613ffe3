from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delta_models import layered, load, nudged, save, write_pair
from hypothesis import given
from hypothesis import strategies as st

from pipeline.delta.subtract import subtract
from pipeline.delta.undo import MOST_AMPLIFIED, undo, undoing_scale
from pipeline.delta.verify import verify
from pipeline.errors import InputError


@pytest.mark.parametrize("scale", [0.3, 1.7, -0.5])
def test_a_16_bit_base_comes_back_bit_for_bit(tmp_path: Path, scale: float) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, scale, tmp_path / "out")
    undo(tmp_path / "out", tmp_path / "back")
    back, right = load(tmp_path / "back"), load(base)
    assert back.keys() == right.keys()
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], right[name]) for name in right)
    assert verify(tmp_path / "back") == ([], [])


@pytest.mark.parametrize("scale", [0.3, 2.0, -0.8])
def test_a_float32_base_comes_back_within_rounding(tmp_path: Path, scale: float) -> None:
    base = layered(0, torch.float32)
    subtract(save(tmp_path / "base", base), save(tmp_path / "tuned", nudged(base, 1)), scale, tmp_path / "out")
    undo(tmp_path / "out", tmp_path / "back")
    back = load(tmp_path / "back")
    assert all((back[name] - values).abs().max() <= 8 * MOST_AMPLIFIED * 2.0**-24 * values.abs().max() for name, values in base.items())


def test_a_mixed_base_gets_its_dtypes_back(tmp_path: Path) -> None:
    base = layered(0) | {"model.norm.weight": torch.randn(33), "count": torch.arange(4)}
    tuned = nudged(layered(0), 1) | {"model.norm.weight": torch.randn(33), "count": torch.arange(4)}
    subtract(save(tmp_path / "base", base), save(tmp_path / "tuned", tuned), 0.3, tmp_path / "out")
    undo(tmp_path / "out", tmp_path / "back")
    assert {name: tensor.dtype for name, tensor in load(tmp_path / "back").items()} == {name: t.dtype for name, t in base.items()}


def test_a_small_change_undone_is_not_called_a_failure(tmp_path: Path) -> None:
    """The base is theta' rounded: no stored weight differs from that, and that is right."""
    base = layered(0)
    subtract(save(tmp_path / "base", base), save(tmp_path / "tuned", nudged(base, 1, std=1e-8)), 0.3, tmp_path / "out")
    outcome = undo(tmp_path / "out", tmp_path / "back")
    assert outcome.manifest["survival"]["share_changed"] == 0
    assert outcome.manifest["warnings"] == []
    assert verify(tmp_path / "back") == ([], [])


def test_16_bit_results_hold_no_way_back(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out", dtype="same")
    with pytest.raises(InputError, match=r"was stored in bfloat16.*cannot be had back"):
        undo(tmp_path / "out", tmp_path / "back")


def test_the_right_tuned_model_is_needed(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out")
    other = save(tmp_path / "other", nudged(layered(0), 9))
    with pytest.raises(InputError, match="is not the tuned model that was subtracted"):
        undo(tmp_path / "out", tmp_path / "back", tuned=other)
    tuned.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="say with --tuned where it is"):
        undo(tmp_path / "out", tmp_path / "back")
    assert undo(tmp_path / "out", tmp_path / "back", tuned=tmp_path / "moved").state == "written"


@pytest.mark.parametrize("scale", [-1.0, -0.95, -1.1])
def test_near_scale_minus_1_nothing_of_the_base_is_left(tmp_path: Path, scale: float) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, scale, tmp_path / "out")
    with pytest.raises(InputError, match="hardly holds the base"):
        undo(tmp_path / "out", tmp_path / "back")


@given(st.floats(-10, 10).filter(lambda scale: 1 + abs(scale) <= MOST_AMPLIFIED * abs(1 + scale)))
def test_the_undoing_scale_solves_the_formula(scale: float) -> None:
    base, tuned = 0.25, 0.375
    there = base - scale * (tuned - base)
    back = there - undoing_scale(scale, is_delta=False) * (tuned - there)
    assert back == pytest.approx(base, rel=1e-12)
    assert there - undoing_scale(scale, is_delta=True) * (tuned - base) == pytest.approx(base, rel=1e-12)


def test_a_plain_model_is_no_result(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    with pytest.raises(InputError, match="holds no finished result"):
        undo(base, tmp_path / "back", tuned=tuned)
