"""The module to train, its weights still empty, and which tensor of the model's source each parameter is to
hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import InputError
from pipeline.models.load import empty_model
from pipeline.train.masters import Binding
from pipeline.weights.floats import as_tensor
from pipeline.weights.names import align_to_model
from pipeline.weights.source import TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_DROPOUTS = "attn_pdrop embd_pdrop resid_pdrop attention_dropout hidden_dropout embedding_dropout activation_dropout dropout layerdrop"


def build(folder: Path, device: str, precision: str, gradient_checkpointing: bool) -> PreTrainedModel:
    """The causal language model of `folder`'s config; under ZeRO-3 (see `engine.session`) it is partitioned
    as it is made.

    Its own dropout (GPT-2 has some) is off: the result must not depend on how a batch is cut up among the
    ranks.
    """
    model = empty_model(
        folder, device, DTYPES[precision], use_cache=False, **dict.fromkeys(_DROPOUTS.split(), 0.0)
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def skeleton(folder: Path) -> PreTrainedModel:
    """The same model on the meta device: names and shapes without memory."""
    return empty_model(folder, "meta", torch.float32)


def num_positions(config: Any) -> int | None:
    """How many tokens the model takes at most; None if its positions have no end (ALiBi)."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def bind(model: torch.nn.Module, source: TensorSource) -> list[Binding]:
    """A binding for each parameter of `model`, tied ones once. Buffers that are stored with the weights are
    filled at once.

    Raises InputError naming what the source lacks, or has in another shape.
    """
    tensors = model.state_dict(keep_vars=True)
    aligned = align_to_model(source.tensors, model)
    bindings = {}
    for name, info in source.tensors.items():
        tensor = tensors.get(aligned.get(name, name))
        if tensor is None:  # what a model computes by itself: rotary frequencies, GPT-2's masks
            continue
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        if shape != info.shape:
            raise InputError(
                f"{name}: shape {info.shape} in the {source.kind} weights, but {shape} by the model's config"
            )
        if isinstance(tensor, torch.nn.Parameter):
            bindings[tensor] = Binding(tensor, source, name)
        else:
            tensor.view(-1).copy_(as_tensor(source.read(name, 0, info.num_elements), info.dtype))
    missing = [name for name, parameter in model.named_parameters() if parameter not in bindings]
    if missing:
        raise InputError(f"{source.kind}: no weights for {', '.join(missing)}")
    return list(bindings.values())
