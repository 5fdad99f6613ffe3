"""LoRA's places and first values on every supported architecture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from delta_models import tensor

from pipeline.errors import InputError
from pipeline.train.lora import InitialAdapter, add_adapter, lora_config
from pipeline.train.model import skeleton
from pipeline.training_config import LoraTraining


@pytest.mark.parametrize(
    ("architecture", "modules", "transposed"),
    [
        ("llama", {"q_proj", "v_proj"}, False),
        ("gpt2", {"c_attn"}, True),
        ("bloom", {"query_key_value"}, False),
    ],
)
def test_query_and_value_projections_by_default(
    tiny_model: Any, architecture: str, modules: set[str], transposed: bool
) -> None:
    model = skeleton(tiny_model(architecture))
    config = lora_config(model, LoraTraining(rank=4, alpha=12))
    assert set(config.target_modules or []) == modules and config.fan_in_fan_out is transposed
    assert (config.r, config.lora_alpha, config.modules_to_save) == (4, 12, None)
    trained = [
        name for name, parameter in add_adapter(model, config).named_parameters() if parameter.requires_grad
    ]
    assert len(trained) == 2 * 2 * len(modules)  # A and B, in each of two layers
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in trained)


def test_modules_that_the_model_lacks_are_named(tiny_model: Any) -> None:
    model: Any = skeleton(tiny_model("llama"))
    with pytest.raises(InputError, match=r"lora.target_modules: the model has no module named w_query"):
        lora_config(model, LoraTraining(target_modules=["q_proj", "w_query"]))
    model.config.model_type = "novel"
    with pytest.raises(InputError, match="not known for novel models"):
        lora_config(model, LoraTraining())


@pytest.mark.parametrize(
    ("architecture", "name", "said"),
    [
        ("llama", "input_layernorm", "LlamaRMSNorm; name linear modules"),
        ("llama", "self_attn", "LlamaAttention; name linear modules"),
        ("llama", "embed_tokens", "Embedding; name linear modules"),
        ("gpt2", "lm_head", "shares its weights with the input embeddings"),
    ],
)
def test_modules_that_cannot_be_adapted_are_named(
    tiny_model: Any, architecture: str, name: str, said: str
) -> None:
    with pytest.raises(InputError, match=rf"lora\.target_modules: {name} .*{said}"):
        lora_config(skeleton(tiny_model(architecture)), LoraTraining(target_modules=[name]))


def test_first_values_depend_on_seed_and_name_alone(tiny_model: Any) -> None:
    model = skeleton(tiny_model("gpt2"))
    adapted = add_adapter(model, lora_config(model, LoraTraining(rank=4)))
    first, same, other = (InitialAdapter(adapted, seed) for seed in (0, 0, 1))
    rows = {name: tensor(first, name) for name in first.tensors}
    for name, whole in rows.items():
        torch.manual_seed(len(name))
        assert torch.equal(tensor(same, name, 3, 50), whole[3:50])
        out = np.full(47, np.nan, np.float32)
        assert same.read(name, 3, 50, out) is out and out.tolist() == whole[3:50].tolist()
        if ".lora_B." in name:
            assert not whole.any()
            continue
        bound = first.tensors[name].shape[1] ** -0.5
        assert bound * 0.8 < whole.abs().max() <= bound and abs(whole.mean()) < 0.3 * bound
        assert not torch.equal(tensor(other, name), whole)
    matrices = [whole for name, whole in rows.items() if ".lora_A." in name]
    assert not torch.equal(matrices[0], matrices[1])
