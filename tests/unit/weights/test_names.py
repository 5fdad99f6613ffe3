"""Names of a running model and of its hub file, brought together one to one or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from delta_models import tensor
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.errors import InputError
from pipeline.weights.formats.open import open_source
from pipeline.weights.names import align_names, align_to_base, align_to_model

HUB = ["wte.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.weight", "ln_f.bias"]
RUNTIME = [f"transformer.{name}" for name in HUB]


def test_same_names_stay() -> None:
    assert align_names(HUB, HUB) == {name: name for name in HUB}


def test_a_missing_prefix_is_found_both_ways() -> None:
    to_hub = align_names([*RUNTIME, "lm_head.weight"], [*HUB, "h.0.attn.bias"])
    assert to_hub == dict(zip(RUNTIME, HUB, strict=True))
    assert align_names([*HUB, "h.0.attn.bias"], [*RUNTIME, "lm_head.weight"]) == dict(
        zip(HUB, RUNTIME, strict=True)
    )


def test_names_without_the_prefix_stay_beside_those_with_it() -> None:
    aligned = align_names([*RUNTIME, "lm_head.weight"], [*HUB, "lm_head.weight"])
    assert aligned["lm_head.weight"] == "lm_head.weight" and aligned["transformer.wte.weight"] == "wte.weight"


def test_nothing_in_common_is_nothing_aligned() -> None:
    assert align_names(["a.weight"], ["b.bias"]) == {}


def test_two_names_for_one_tensor_are_refused() -> None:
    with pytest.raises(InputError, match="one to one"):
        align_names(["transformer.a", "transformer.b", "a"], ["a", "b"])


names = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), max_size=8, unique=True
)


@given(names, names)
def test_alignment_is_always_one_to_one(source: list[str], base: list[str]) -> None:
    try:
        aligned = align_names(source, base)
    except InputError:
        return
    assert len(set(aligned.values())) == len(aligned)
    assert aligned.keys() <= set(source) and set(aligned.values()) <= set(base)
    assert all(aligned[name] == name for name in set(source) & set(base))


def hub_gpt2(folder: Path, out: Path) -> Path:
    """GPT-2 as the hub has it: no prefix, and its attention masks among the weights."""
    source = open_source(folder)
    tensors = {
        name.removeprefix("transformer."): tensor(source, name).view(info.shape)
        for name, info in source.tensors.items()
    }
    out.mkdir()
    save_file(
        tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()},
        out / "model.safetensors",
    )
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


def test_gpt2_as_the_hub_has_it(tiny_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model("gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    base = open_source(hub_gpt2(folder, tmp_path / "hub"))
    to_base = align_to_base(list(model.state_dict()), base)
    assert to_base["transformer.wte.weight"] == "wte.weight" and "lm_head.weight" not in to_base
    to_model = align_to_model(base.tensors, model)
    assert to_model == {name: runtime for runtime, name in to_base.items()}
    tuned = open_source(folder, base)
    assert tuned.tensors.keys() == base.tensors.keys() - {"h.0.attn.bias"}
    assert all(torch.equal(tensor(tuned, name), tensor(base, name)) for name in tuned.tensors)


def test_renames_that_transformers_does_on_loading(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(tmp_path)
    base = open_source(tmp_path)
    runtime = {name for name, _ in model.named_parameters()}
    assert base.tensors.keys() != runtime, (
        "transformers renames nothing here any more: this test needs another model"
    )
    to_base = align_to_base(list(runtime), base)
    assert to_base.keys() == runtime and set(to_base.values()) == base.tensors.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(tensor(base, to_base[name]), parameter.detach().flatten())
    assert align_to_model(base.tensors, model) == {
        name: runtime_name for runtime_name, name in to_base.items()
    }


def test_models_that_transformers_regroups_are_refused(tmp_path: Path) -> None:
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight" for i in range(2)]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}'
    )
    with pytest.raises(InputError, match="regroups"):
        align_to_base(["model.layers.0.mlp.experts.gate_up_proj"], open_source(tmp_path))
