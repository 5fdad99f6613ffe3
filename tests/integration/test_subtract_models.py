"""theta' of four families of models loads with `from_pretrained` and answers as the formula's weights do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_models import Tensors, load, save
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from zero_checkpoint import Checkpoint

from pipeline.delta.subtract import subtract
from pipeline.delta.verify import Verdict, verify

pytestmark = pytest.mark.slow

SCALE = 0.4
IDS = torch.tensor([[5, 9, 200, 31, 77, 3]])


@pytest.fixture(params=["llama", "gpt2", "bloom", "qwen2"])
def base(request: pytest.FixtureRequest, tiny_model: object, tmp_path: Path) -> Path:
    """A model as the hub has it, in bfloat16.

    GPT-2 and BLOOM lack the prefix `transformer.`, and GPT-2 has its old masks.
    """
    folder = tmp_path / "base"
    if request.param == "qwen2":
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            Qwen2Config(vocab_size=512, tie_word_embeddings=True, **sizes)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)  # biases and norms, too
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_model(request.param))  # type: ignore[operator]
    model.bfloat16().save_pretrained(folder)
    tensors = {name.removeprefix("transformer."): values for name, values in load(folder).items()}
    if request.param == "gpt2":
        tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril() for layer in range(2)}
    save(folder, tensors)
    return folder


def tuned_model(base: Path) -> PreTrainedModel:
    """The base in float32 after a step in every direction."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def expected_logits(base: Path, tuned: PreTrainedModel) -> torch.Tensor:
    """Of a model whose parameters are the formula of the two models' parameters."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for mine, other in zip(model.parameters(), tuned.parameters(), strict=True):
            mine.copy_(mine - torch.tensor(SCALE) * (other - mine))
        return model(IDS).logits


def checkpoint_of(model: PreTrainedModel, stage: int, world_size: int) -> Checkpoint:
    parameters: Tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    owners = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    aliases = {name: owners[parameter.data_ptr()] for name, parameter in every if name not in parameters}
    return Checkpoint(stage, world_size, [parameters], aliases=aliases)


@pytest.mark.parametrize("source", ["folder", "zero-2", "zero-3"])
def test_loads_and_has_the_references_logits(base: Path, tmp_path: Path, source: str) -> None:
    tuned = tuned_model(base)
    if source == "folder":
        tuned.save_pretrained(tmp_path / "tuned")
    else:
        checkpoint_of(tuned, int(source[-1]), 3).write(tmp_path / "tuned")
    subtract(base, tmp_path / "tuned", SCALE, tmp_path / "out", max_shard_size="50KB")
    assert load(tmp_path / "out").keys() == load(base).keys()
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    made, info = loaded
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert made.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, expected_logits(base, tuned))
    assert verify(tmp_path / "out") == Verdict([], [])


def test_the_config_says_the_new_dtype_and_nothing_else(base: Path, tmp_path: Path) -> None:
    tuned_model(base).save_pretrained(tmp_path / "tuned")
    subtract(base, tmp_path / "tuned", SCALE, tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after == before | {"dtype": "float32"}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.float32
