"""Loading: a model filled tensor by tensor is as `from_pretrained` makes it; where a config comes from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.artifact import Artifact
from pipeline.errors import InputError
from pipeline.models.load import empty_model, fill, load_model, load_tokenizer, open_weights
from pipeline.weights.formats.open import open_source

TinyModelFactory = Callable[..., Path]
IDS = torch.arange(4, 44).reshape(2, 20)


def artifact(folder: Path, place: Path | str, kind: str, **inputs: str) -> Artifact:
    made = Artifact(folder)
    made.commit({"result": {"model": str(place), "model_kind": kind}, "inputs": inputs})
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_filled_is_as_from_pretrained(
    tiny_model: TinyModelFactory, architecture: str, dtype: torch.dtype
) -> None:
    folder = tiny_model(architecture)
    model = empty_model(folder, "cpu", dtype)
    for parameter in model.parameters():  # whatever was in memory must not show
        parameter.data.fill_(float("nan"))
    fill(model, open_source(folder))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.dtype == dtype and torch.equal(logits(model), logits(expected))
    assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id
    owner, alias = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (owner is alias) == (architecture != "llama")


def test_names_of_the_hubs_gpt2(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    """Old GPT-2 files lack the `transformer.` prefix and carry the attention's masks."""
    folder = Path(shutil.copytree(tiny_model("gpt2"), tmp_path / "gpt2"))
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    weights = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(
        weights | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, folder / "model.safetensors", {"format": "pt"}
    )
    model = empty_model(folder, "cpu", torch.float32)
    fill(model, open_source(folder))
    assert torch.equal(logits(model), expected)


def test_what_is_missing_or_has_another_shape_is_named(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "llama"))
    weights = load_file(folder / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lack model\.norm\.weight"):
        fill(empty_model(folder, "cpu", torch.float32), open_source(folder))
    save_file(
        weights | {"model.norm.weight": norm[:-1].clone()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"model\.norm\.weight: shape \(31,\)"):
        fill(empty_model(folder, "cpu", torch.float32), open_source(folder))


def test_a_folder_inside_an_artifact_and_elsewhere(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    folder = tiny_model("bloom")
    elsewhere = artifact(tmp_path / "model-1", folder, "folder")
    shutil.copytree(folder, tmp_path / "model-2" / "model")
    inside = artifact(tmp_path / "model-2", "model", "folder")
    assert elsewhere.model_folder == folder and inside.model_folder == tmp_path / "model-2" / "model"
    assert torch.equal(
        logits(load_model(elsewhere, "cpu", torch.float32)), logits(load_model(inside, "cpu", torch.float32))
    )
    assert not load_model(inside, "cpu", torch.float32).training


def test_config_and_tokenizer_come_from_the_model_it_was_tuned_from(
    tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    base = artifact(tmp_path / "model-1", tiny_model("llama"), "folder")
    tuned = artifact(tmp_path / "tune_old-1", "adapter", "adapter", model="model-1")
    assert tuned.model_folder == base.model_folder
    assert load_tokenizer(tuned).bos_token == "<s>"


def test_a_folder_that_went_away(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    base = artifact(tmp_path / "model-1", folder, "folder")
    shutil.rmtree(folder)
    for act in (attrgetter("model_folder"), load_tokenizer, open_weights):
        with pytest.raises(InputError, match="base"):
            act(base)
