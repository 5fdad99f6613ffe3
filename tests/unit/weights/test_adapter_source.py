"""LoRA adapters on a base: what is added to which tensor, and refused by name where they are more than plain
LoRA.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import InputError
from pipeline.weights.adapter import AdapterSource
from pipeline.weights.open import open_source

Q, K, DOWN, NORM = (
    "model.layers.0.q_proj.weight",
    "model.layers.0.k_proj.weight",
    "model.layers.1.down_proj.weight",
    "model.norm.weight",
)
BASE = {
    Q: torch.randn(6, 10).bfloat16(),
    K: torch.randn(6, 6),
    DOWN: torch.randn(10, 7),
    NORM: torch.randn(10).bfloat16(),
}
FACTORS = {
    "base_model.model.model.layers.0.q_proj.lora_A.weight": torch.randn(3, 10),
    "base_model.model.model.layers.0.q_proj.lora_B.weight": torch.randn(6, 3),
    "base_model.model.model.layers.1.down_proj.lora_A.weight": torch.randn(2, 7).bfloat16(),
    "base_model.model.model.layers.1.down_proj.lora_B.weight": torch.randn(10, 2).bfloat16(),
}
CONFIG = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 12,
    "rank_pattern": {"down_proj": 2},
    "alpha_pattern": {r"layers\.1\.down_proj": 5},
}


def write(
    folder: Path,
    config: dict[str, Any] = CONFIG,
    factors: dict[str, torch.Tensor] = FACTORS,
    base: Any = BASE,
) -> AdapterSource:
    (folder / "base").mkdir(exist_ok=True)
    (folder / "adapter").mkdir(exist_ok=True)
    save_file(base, folder / "base" / "model.safetensors")
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    source = open_source(folder / "adapter", open_source(folder / "base"))
    assert isinstance(source, AdapterSource)
    return source


def product(module: str, scaling: float) -> torch.Tensor:
    a, b = (FACTORS[f"base_model.model.{module}.lora_{factor}.weight"].double() for factor in "AB")
    return (b @ a * scaling).float()


def test_the_change_is_added_in_float32_and_the_rest_is_the_base(tmp_path: Path) -> None:
    source = write(tmp_path)
    changes = {Q: product("model.layers.0.q_proj", 4.0), DOWN: product("model.layers.1.down_proj", 2.5)}
    assert source.kind == "adapter" and source.changed == {Q, DOWN} and source.tensors.keys() == BASE.keys()
    for name, tensor in BASE.items():
        values = source.read(name, 0, tensor.numel()).view(tensor.shape)
        if name in changes:
            assert source.tensors[name].dtype == "float32" and torch.equal(
                values, tensor.float() + changes[name]
            )
            assert torch.equal(source.delta(name, 0, tensor.numel()).view(tensor.shape), changes[name])
        else:
            assert values.dtype == tensor.dtype and torch.equal(values, tensor)


def test_rank_stabilised_scaling(tmp_path: Path) -> None:
    source = write(tmp_path, CONFIG | {"use_rslora": True})
    assert torch.equal(source.delta(Q, 0, 60).view(6, 10), product("model.layers.0.q_proj", 12 / 3**0.5))


def test_a_conv1d_base_has_the_change_transposed(tmp_path: Path) -> None:
    turned = {name: tensor.T.contiguous() if tensor.dim() == 2 else tensor for name, tensor in BASE.items()}
    source = write(tmp_path, CONFIG | {"fan_in_fan_out": True}, base=turned)
    assert torch.equal(source.delta(Q, 0, 60).view(10, 6), product("model.layers.0.q_proj", 4.0).T)


@pytest.mark.parametrize("is_conv1d", [True, False])
def test_a_square_weight_is_read_as_the_config_says(tmp_path: Path, is_conv1d: bool) -> None:
    a, b = torch.randn(3, 6), torch.randn(6, 3)
    prefix = "base_model.model.model.layers.0.k_proj"
    source = write(
        tmp_path,
        CONFIG | {"fan_in_fan_out": is_conv1d},
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
    )
    expected = (b.double() @ a.double() * 4).float()
    assert torch.equal(source.delta(K, 0, 36).view(6, 6), expected.T if is_conv1d else expected)


def test_threads_do_not_write_over_each_others_panels(tmp_path: Path) -> None:
    a, b = torch.randn(3, 2000), torch.randn(500, 3)
    prefix = "base_model.model.model.layers.0.q_proj"
    factors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    source = write(tmp_path, factors=factors, base={Q: torch.zeros(500, 2000)})
    starts = range(0, 1_000_000, 100_000)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: source.delta(Q, start, start + 100_000), starts))
    assert torch.equal(torch.cat(parts).view(500, 2000), (b.double() @ a.double() * 4).float())


def test_a_base_without_the_prefix(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in BASE.items()}
    assert write(tmp_path, base=bare).changed == {"layers.0.q_proj.weight", "layers.1.down_proj.weight"}


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
    return {name: tensor for name, tensor in FACTORS.items() if not name.endswith(names)}


@pytest.mark.parametrize(
    ("factors", "message"),
    [
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
            FACTORS | {"base_model.model.model.layers.0.q_proj.lora_magnitude_vector": torch.ones(2)},
            "magnitude.*; merge the adapter",
        ),
        (
            FACTORS
            | {f"base_model.model.model.other.lora_{factor}.weight": torch.ones(3, 3) for factor in "AB"},
            r"lacks.*model\.other",
        ),
        (
            without("q_proj.lora_A.weight")
            | {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(3, 11)},
            "another model",
        ),
        (
            without("q_proj.lora_A.weight")
            | {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(30)},
            "product",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, factors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path, factors=factors)


def test_an_adapter_needs_its_base_and_its_weights(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(InputError, match="must be given"):
        open_source(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        open_source(tmp_path / "adapter", open_source(tmp_path / "base"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        open_source(tmp_path / "adapter", open_source(tmp_path / "base"))
