"""What a path holds, told from its files; and what to give instead, where it is not what was meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from delta_models import Tensors, layered, load, save
from safetensors.torch import save_file
from zero_checkpoint import Checkpoint

from pipeline.errors import InputError
from pipeline.weights.formats.adapter import Adapter
from pipeline.weights.formats.open import open_source


def refused(path: Path | str, base: Path | None = None) -> str:
    """Why it is refused, which is one line."""
    with pytest.raises(InputError) as caught:
        open_source(path, None if base is None else open_source(base))
    assert str(caught.value).isprintable()
    return str(caught.value)


def factors(model: Tensors, adapter: str = "") -> Tensors:
    """What PEFT adds to the query projections of `model`, under the names that an adapter's file has.

    With `adapter`: those of a running model.
    """
    modules = [name.removesuffix(".weight") for name in model if "q_proj" in name]
    return {
        f"base_model.model.{module}.lora_{factor}.{adapter}weight": torch.ones(33, 33)
        for module in modules
        for factor in "AB"
    }


def save_lora_run(folder: Path) -> None:
    """What the Trainer leaves of a LoRA run: the adapter, and beside it a ZeRO checkpoint of what ran."""
    model = layered(0)
    frozen = {
        f"base_model.model.{name.replace('q_proj', 'q_proj.base_layer')}": values
        for name, values in model.items()
    }
    Checkpoint(2, 2, [factors(model, "default.")], frozen=frozen, step=5).write(folder)
    save_file(factors(model), folder / "adapter_model.safetensors")


@pytest.mark.parametrize("place", ["step-5", "adapter_model.safetensors"])
def test_of_a_lora_run_the_adapters_folder_is_wanted(tmp_path: Path, place: str) -> None:
    base, run = save(tmp_path / "base", layered(0)), tmp_path / "run"
    save_lora_run(run)
    assert "give the adapter's folder: the one with adapter_config.json" in refused(run, base)
    (run / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 33, "lora_alpha": 8}))
    told = refused(run / place, base)
    assert told.startswith(f"{run / place}: ") and told.endswith(f"give the adapter's folder: {run}")
    assert told.count("base_model.") == 1, "one name is enough"
    assert Adapter(run).modules.keys() == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    assert open_source(run / place).tensors, "it can be looked into"
    assert open_source(run / place, open_source(run / place)).tensors, "and compared with another one"


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-2-7b-hf"])
def test_a_model_that_is_on_the_hub_alone(name: str) -> None:
    told = refused(name)
    assert f"`hf download {name} --local-dir FOLDER`" in told and "flearn models list" in told


@pytest.mark.parametrize("name", ["models/tuned", "a/b/c", "model.safetensors", "/gpt2", "two words"])
def test_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert refused(name) == f"{name}: no such file or folder"


def test_a_save_folder_without_latest(tmp_path: Path) -> None:
    for step in (3, 5):
        Checkpoint(2, 1, [layered(0)], step=step).write(tmp_path)
    (tmp_path / "latest").unlink()
    (tmp_path / "logs").mkdir()
    told = refused(tmp_path)
    assert "no file `latest`" in told and told.endswith(f": {tmp_path / 'step-3'}, {tmp_path / 'step-5'}")
    assert (
        open_source(tmp_path / "step-5").tensors.keys() == load(save(tmp_path / "model", layered(0))).keys()
    )
    assert "no weights found" in refused(tmp_path / "logs")
