"""Small models as safetensors folders, and the formula computed in memory, for the tests of subtraction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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
