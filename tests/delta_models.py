"""Small models as safetensors folders, and the formula computed in memory, for the tests of subtraction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.artifact import write_json
from pipeline.weights.floats import as_tensor
from pipeline.weights.source import TensorSource

Tensors = dict[str, torch.Tensor]


def save(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def load(folder: Path) -> Tensors:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def tensor(source: TensorSource, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Elements [start, stop) of one of `source`'s tensors, 1-D; `stop` None: to its end."""
    info = source.tensors[source.aliases.get(name, name)]
    stop = info.num_elements if stop is None else stop
    return as_tensor(source.read(name, start, stop), info.dtype)


def formula(base: Tensors, tuned: Tensors, scale: float) -> Tensors:
    """The documented arithmetic, tensor by tensor in memory."""
    rounded = torch.tensor(scale, dtype=torch.float32)
    return {
        name: values.float() - rounded * (tuned[name].float() - values.float())
        for name, values in base.items()
    }


def layered(seed: int, dtype: torch.dtype = torch.bfloat16, num_layers: int = 3) -> Tensors:
    """A model of odd sizes, with names like Llama's."""
    generator = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)

    tensors = {"model.embed_tokens.weight": weights(101, 33)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = weights(33, 33)
        tensors[f"{prefix}.mlp.up_proj.weight"] = weights(77, 33)
        tensors[f"{prefix}.input_layernorm.weight"] = weights(33)
    return tensors | {"model.norm.weight": weights(33), "lm_head.weight": weights(101, 33)}


def nudged(tensors: Tensors, seed: int, std: float = 1e-3, dtype: torch.dtype = torch.float32) -> Tensors:
    """The same model after a fine-tuning that changed every weight a little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (values.float() + torch.randn(values.shape, generator=generator) * std).to(dtype)
        for name, values in tensors.items()
    }


def write_pair(folder: Path) -> tuple[Path, Path]:
    """(base in bfloat16, tuned in float32), each a model folder."""
    base = layered(0)
    return save(folder / "base", base), save(folder / "tuned", nudged(base, 1))


def write_adapter(
    folder: Path,
    seed: int = 0,
    rank: int = 3,
    alpha: float = 6,
    size: int = 33,
    layers: tuple[int, ...] = (0, 2),
) -> dict[str, torch.Tensor]:
    """An adapter on q_proj of some layers; {tensor: its change in float64}."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    changes: dict[str, torch.Tensor] = {}
    for layer in layers:
        module = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (
            torch.randn(rank, size, generator=generator) * 0.1,
            0.1 * torch.randn(size, rank, generator=generator),
        )
        factors |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        changes[f"{module}.weight"] = alpha / rank * (b.double() @ a.double())
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]},
    )
    return changes
