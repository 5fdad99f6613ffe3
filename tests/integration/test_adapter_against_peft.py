"""Adapters that PEFT saved, against PEFT's own merge in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from delta_models import tensor

from pipeline.delta.virtual import adapted
from pipeline.weights.formats.open import open_source

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "llama, patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 5},
            "alpha_pattern": {r"layers\.1\..*\.down_proj": 9, "model.layers.0.self_attn.q_proj": 1},
        },
    ),
    "llama, rank-stabilised": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "gpt2, Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2, Conv1D, square alone": ("gpt2", {"target_modules": r".*attn\.c_proj"}),
    "bloom": ("bloom", {"target_modules": ["query_key_value", "dense"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_peft_merges_to_the_same(tiny_model: Any, tmp_path: Path, name: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    architecture, settings = SETTINGS[name]
    folder = tiny_model(architecture)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, lora_alpha=6, **settings)
    )
    torch.manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(str(tmp_path))
    base = open_source(folder)
    source = adapted(base, tmp_path)
    merged = model.merge_and_unload().state_dict()
    changed = source.vector.names
    assert changed
    for tensor_name, info in source.tensors.items():
        values = tensor(source, tensor_name).view(info.shape)
        if tensor_name in changed:
            assert not torch.equal(values, tensor(base, tensor_name).view(info.shape))
            torch.testing.assert_close(values, merged[tensor_name], atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(values, merged[tensor_name])
