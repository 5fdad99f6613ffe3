"""The module to train, made without values, and the parameter that each tensor of a source belongs in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import InputError
from pipeline.models.load import empty_model
from pipeline.train.masters import Binding, read_into
from pipeline.weights.names import align_to_model
from pipeline.weights.source import TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_DROPOUTS = (
    "attn_pdrop embd_pdrop resid_pdrop attention_dropout hidden_dropout embedding_dropout activation_dropout"
    " dropout layerdrop"
)


def build(folder: Path, device: str, precision: str, gradient_checkpointing: bool) -> PreTrainedModel:
    """The causal language model of `folder`'s config, its parameters holding whatever was in memory.

    Its own dropout (GPT-2 has some) is off: the result must not depend on how a batch is split.
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


def architecture(folder: Path) -> dict[str, Any]:
    """What `folder`'s config says of the model itself: not where it lies, nor how its weights were stored."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).to_dict()
    elsewhere = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
    return {name: value for name, value in config.items() if name not in elsewhere}


def num_positions(config: Any) -> int | None:
    """How many tokens the model takes at most; None if its positions have no end (ALiBi)."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


class Places:
    """Where the tensors of a source belong in a model that is being trained.

    Made of `model` before an adapter is added, which renames its tensors. The parameters stay the same
    objects, whatever PEFT and DeepSpeed do to them. `plain` is its skeleton, which keeps the names.
    """

    def __init__(self, model: torch.nn.Module, plain: torch.nn.Module) -> None:
        self._model = model
        self._tensors = model.state_dict(keep_vars=True)
        self._parameters = dict(model.named_parameters())  # tied ones once
        self._plain = plain

    def bind(self, source: TensorSource) -> list[Binding]:
        """A binding for each parameter, tied ones once. Buffers that are stored with the weights are filled.

        Raises InputError naming what the source lacks, or has in another shape.
        """
        aligned = align_to_model(source.tensors, self._plain)
        bindings = {}
        for name, info in source.tensors.items():
            own_name = aligned.get(name, name)
            tensor = self._tensors.get(own_name)
            if tensor is None:  # what a model computes by itself: rotary frequencies, GPT-2's masks
                continue
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
            if shape != info.shape:
                raise InputError(
                    f"{name}: shape {info.shape} in the {source.kind} weights, but {shape} by the model's"
                    " config"
                )
            if isinstance(tensor, torch.nn.Parameter):
                bindings[tensor] = Binding(tensor, source, name)
            else:  # DeepSpeed may have put a buffer of another dtype in its place
                read_into(self._model.get_buffer(own_name).view(-1), source, name, 0)
        missing = [name for name, parameter in self._parameters.items() if parameter not in bindings]
        if missing:
            raise InputError(f"{source.kind}: no weights for {', '.join(missing)}")
        return list(bindings.values())
