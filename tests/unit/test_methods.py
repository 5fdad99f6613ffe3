"""METHODS: what a wrong row is told when the table is built, and that each row can be run."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.methods import KINDS, METHODS, Method
from pipeline.training_config import read_training


@pytest.mark.parametrize("kinds", [{"learn": "rome"}, {"learn": "full", "subtract": "adapter"}])
def test_a_kind_of_training_that_there_is_not_is_an_error_at_once(kinds: Any) -> None:
    with pytest.raises(ValueError, match=r"^ROME: no kind of training is called (rome|adapter)"):
        Method("ROME", **kinds)


def test_every_kind_has_a_training_section_of_its_own() -> None:
    assert {kind: read_training({"kind": kind}).kind for kind in KINDS} == {kind: kind for kind in KINDS}


def test_a_baseline_is_another_method() -> None:
    papers: dict[str, str | None] = {"full_ft": None, "lora": None}
    papers |= {"flearn_ft": "full_ft", "flearn_lora": "lora", "flearn_lora_ft": "full_ft"}
    assert {name: METHODS[name].baseline for name in papers} == papers
    for name, method in METHODS.items():
        assert method.baseline is None or method.baseline in METHODS.keys() - {name}
