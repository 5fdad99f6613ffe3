from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delta_models import Tensors, layered, nudged, save

from pipeline.delta.match import Match, is_recomputed, is_subtracted, match
from pipeline.errors import InputError
from pipeline.weights.formats.open import open_source
from pipeline.weights.source import TensorInfo


def matched(tmp_path: Path, base: Tensors, tuned: Tensors) -> Match:
    source = open_source(save(tmp_path / "base", base))
    return match(source, open_source(save(tmp_path / "tuned", tuned), base=source))


def test_every_weight_of_the_base_goes_with_its_like(tmp_path: Path) -> None:
    base = layered(0) | {"count": torch.arange(3)}
    found = matched(tmp_path, base, nudged(layered(0), 1) | {"count": torch.arange(3) + 1})
    assert found.names == {name: name for name in layered(0)}
    assert found.notes == []


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    base, tuned = layered(0), nudged(layered(0), 1)
    del tuned["model.norm.weight"], tuned["model.layers.1.mlp.up_proj.weight"]
    tuned["model.layers.9.mlp.up_proj.weight"] = torch.randn(2, 2)
    tuned["model.layers.0.self_attn.q_proj.weight"] = torch.randn(33, 34)
    tuned["model.layers.2.input_layernorm.weight"] = torch.arange(33)
    with pytest.raises(InputError) as caught:
        matched(tmp_path, base, tuned)
    for said in (
        "model.norm.weight 33 is missing",
        "model.layers.1.mlp.up_proj.weight 77x33 is missing",
        "model.layers.9.mlp.up_proj.weight 2x2 is in the tuned model but not in the base",
        "model.layers.0.self_attn.q_proj.weight is 33x33 in the base and 33x34 in the tuned model",
        "model.layers.2.input_layernorm.weight is bfloat16 in the base and int64 in the tuned model",
    ):
        assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_resized_vocabulary_is_refused_with_the_reason(tmp_path: Path) -> None:
    tuned = nudged(layered(0), 1) | {
        "model.embed_tokens.weight": torch.randn(102, 33),
        "lm_head.weight": torch.randn(102, 33),
    }
    with pytest.raises(
        InputError, match=r"lm_head.weight is 101x33 .* 102x33 .*vocabulary was resized.*embed_tokens"
    ):
        matched(tmp_path, layered(0), tuned)


def test_empty_and_quantised_tensors_are_refused(tmp_path: Path) -> None:
    base = layered(0) | {
        "model.norm.weight": torch.empty(0),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(77, 33, dtype=torch.int8),
    }
    with pytest.raises(InputError, match=r"model.norm.weight is empty") as caught:
        matched(tmp_path, base, nudged(layered(0), 1))
    assert "up_proj.weight is quantised (int8)" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (16,), True),
        ("h.0.attn.bias", (1, 1, 8, 8), True),
        ("transformer.h.11.attn.masked_bias", (), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 8, 8), True),
        ("h.0.attn.bias", (8,), False),
        ("h.0.attn.c_attn.bias", (24,), False),
        ("transformer.h.0.self_attention.dense.bias", (8,), False),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False),
    ],
)
def test_recomputed_buffers(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_recomputed(TensorInfo(name, shape, "float32")) is expected
    assert is_subtracted(TensorInfo(name, shape, "float32")) is not expected
    assert not is_subtracted(TensorInfo(name, shape, "int64"))


def test_buffers_that_only_one_side_has_do_not_matter(tmp_path: Path) -> None:
    base = layered(0) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(8)}
    tuned = nudged(layered(0), 1) | {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.randn(8),
        "step": torch.tensor(3),
    }
    found = matched(tmp_path, base, tuned)
    assert found.names.keys() == layered(0).keys()
    assert len(found.notes) == 2


@pytest.mark.parametrize("has_head", ["base", "tuned"])
def test_a_tied_head_may_be_stored_on_either_side(tmp_path: Path, has_head: str) -> None:
    tied = {"base": layered(0), "tuned": nudged(layered(0), 1)}
    for side, tensors in tied.items():
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if side != has_head:
            del tensors["lm_head.weight"]
    found = matched(tmp_path, tied["base"], tied["tuned"])
    assert set(found.names) == set(tied["base"])
    if has_head == "base":
        assert found.names["lm_head.weight"] == "model.embed_tokens.weight"


def test_a_head_that_is_not_tied_is_missed(tmp_path: Path) -> None:
    tuned = nudged(layered(0), 1)
    del tuned["lm_head.weight"]
    with pytest.raises(InputError, match=r"lm_head.weight 101x33 is missing"):
        matched(tmp_path, layered(0), tuned)


def test_a_head_that_training_untied_is_refused(tmp_path: Path) -> None:
    base = layered(0)
    del base["lm_head.weight"]
    with pytest.raises(InputError, match=r"lm_head.weight 101x33 is in the tuned model but not in the base"):
        matched(tmp_path, base, nudged(layered(0), 1))


def test_a_tuned_model_in_16_bits_is_noted(tmp_path: Path) -> None:
    found = matched(tmp_path, layered(0), nudged(layered(0), 1, dtype=torch.bfloat16))
    assert found.notes == [
        "the tuned model is stored in bfloat16: changes smaller than its steps were lost when it was saved"
    ]
