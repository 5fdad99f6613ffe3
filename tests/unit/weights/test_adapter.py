"""LoRA adapters' files: modules, ranks and scalings; what is more than plain LoRA is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import InputError
from pipeline.weights.formats.adapter import Adapter, is_adapter
from pipeline.weights.formats.open import open_source

QUERY, DOWN = "model.layers.0.q_proj", "model.layers.1.down_proj"
FACTORS = {
    f"base_model.model.{QUERY}.lora_A.weight": torch.randn(3, 10),
    f"base_model.model.{QUERY}.lora_B.weight": torch.randn(6, 3),
    f"base_model.model.{DOWN}.lora_A.weight": torch.randn(2, 7).bfloat16(),
    f"base_model.model.{DOWN}.lora_B.weight": torch.randn(10, 2).bfloat16(),
}
CONFIG = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 12,
    "rank_pattern": {"down_proj": 2},
    "alpha_pattern": {r"layers\.1\.down_proj": 5},
}


def write(
    folder: Path, config: dict[str, Any] = CONFIG, factors: dict[str, torch.Tensor] = FACTORS
) -> Adapter:
    """An adapter of these factors, opened."""
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return Adapter(folder)


def test_each_module_has_two_factors_and_a_scaling(tmp_path: Path) -> None:
    modules = write(tmp_path).modules
    assert {module: (one.a.shape, one.b.shape, one.scaling) for module, one in modules.items()} == {
        QUERY: ((3, 10), (6, 3), 12 / 3),
        DOWN: ((2, 7), (10, 2), 5 / 2),
    }
    assert modules[DOWN].a.name == f"base_model.model.{DOWN}.lora_A.weight"
    assert modules[DOWN].b.dtype == "bfloat16"


def test_rank_stabilised_scaling(tmp_path: Path) -> None:
    modules = write(tmp_path, CONFIG | {"use_rslora": True}).modules
    assert (modules[QUERY].scaling, modules[DOWN].scaling) == (12 / 3**0.5, 5 / 2**0.5)


def test_an_old_adapters_bin_file(tmp_path: Path) -> None:
    right = write(tmp_path).modules
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(FACTORS, tmp_path / "adapter_model.bin")
    assert Adapter(tmp_path).modules == right


REFUSED = [
    ({"peft_type": "IA3"}, "IA3"),
    ({"use_dora": True}, "DoRA.*; merge the adapter"),
    ({"bias": "all"}, "bias: all.*; merge the adapter"),
    ({"lora_bias": True}, "lora_B"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"init_lora_weights": "pissa"}, "pissa"),
    ({"init_lora_weights": "loftq"}, "loftq"),
    ({"r": None}, "r is None"),
    ({"r": 0}, "r is 0"),
    ({"r": -3}, "r is -3"),
    ({"r": float("inf")}, "r is inf"),
    ({"r": float("nan")}, "r is nan"),
    ({"r": True}, "r is True"),
    ({"rank_pattern": {"down_proj": 0}}, "rank_pattern 'down_proj' is 0"),
    ({"rank_pattern": [2]}, "rank_pattern is"),
    ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"alpha_pattern": {"q": float("nan")}}, "alpha_pattern 'q' is nan"),
    ({"rank_pattern": {"(": 2}}, "regular expression"),
    ({"r": 5, "rank_pattern": {}}, "rank 5"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_other_methods_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        write(tmp_path, CONFIG | change)
    assert "\n" not in str(caught.value)


def without(*names: str) -> dict[str, torch.Tensor]:
    """The factors but for those whose names end so."""
    return {name: values for name, values in FACTORS.items() if not name.endswith(names)}


WRONG_FACTORS = [
    (without("q_proj.lora_B.weight"), "q_proj"),
    (
        FACTORS | {"base_model.model.model.embed.lora_embedding_A": torch.ones(2, 3)},
        "lora_embedding_A; merge the adapter",
    ),
    (FACTORS | {"base_model.model.lm_head.weight": torch.ones(2, 3)}, "lm_head.*; merge the adapter"),
    (
        FACTORS | {"base_model.model.lm_head.base_layer.weight": torch.ones(2, 3)},
        "base_layer.weight; merge the adapter",
    ),
    (
        FACTORS | {f"base_model.model.{QUERY}.lora_magnitude_vector": torch.ones(2)},
        "magnitude.*; merge the adapter",
    ),
    (FACTORS | {f"base_model.model.{QUERY}.lora_A.weight": torch.ones(30)}, "product"),
]


@pytest.mark.parametrize(("factors", "message"), WRONG_FACTORS)
def test_what_is_no_product_is_refused(
    tmp_path: Path, factors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path, factors=factors)


def test_an_adapter_needs_its_base_and_its_weights(tmp_path: Path) -> None:
    write(tmp_path)
    assert is_adapter(tmp_path)
    with pytest.raises(InputError, match="must be given"):
        open_source(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        Adapter(tmp_path)
    save_file(FACTORS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        Adapter(tmp_path)
