"""The model that a stage made: its weights as a tensor source, its tokenizer, or a module that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from pipeline.artifact import Artifact
from pipeline.delta.virtual import adapted
from pipeline.errors import InputError
from pipeline.weights.floats import as_tensor
from pipeline.weights.formats.open import open_source
from pipeline.weights.names import align_to_model
from pipeline.weights.source import TensorSource

_SLICE_ELEMENTS = 1 << 22
"""Elements copied at a time: 16 MiB in fp32."""


def open_weights(artifact: Artifact) -> TensorSource:
    """The weights that `artifact` stands for, read in place.

    They are a folder's, a ZeRO checkpoint's masters, or an adapter's change added to its base.
    """
    path = Path(artifact.model_path)
    if artifact.result["model_kind"] == "folder":
        return open_source(path)
    base = open_weights(artifact.input("model"))
    return adapted(base, path) if artifact.result["model_kind"] == "adapter" else open_source(path, base)


def load_tokenizer(artifact: Artifact) -> PreTrainedTokenizerBase:
    """The fast tokenizer of `artifact`'s model. Raises InputError if it has none."""
    folder = artifact.model_folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Answers are found in a text by character offsets, which slow tokenizers do not give.
    if not tokenizer.is_fast:
        raise InputError(
            f"{folder}: this model has no fast tokenizer (tokenizer.json); convert it with transformers first"
        )
    return tokenizer


def load_model(artifact: Artifact, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `artifact`, ready to run, its weights in `dtype` on `device`.

    Adapters are merged in fp32, then rounded to `dtype`. Host memory holds the weights once at most.
    """
    folder = artifact.model_folder
    if artifact.result["model_kind"] == "folder":
        return _from_folder(folder, device, dtype).eval()
    model = empty_model(folder, device, dtype)
    source = open_weights(artifact)
    try:
        fill(model, source)
    finally:
        source.close()
    return model.eval()


def _from_folder(folder: Path, device: str, dtype: torch.dtype) -> PreTrainedModel:
    # With a device map each tensor goes straight to its device. Without one the host would hold the model.
    placement = {} if device == "cpu" else {"device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **placement)  # type: ignore[return-value]


def empty_model(folder: Path, device: str, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """A model without its weights: parameters hold whatever was in memory.

    Computed buffers (rotary frequencies) are right. `settings` replace those of its config that it has;
    others are ignored.
    """
    config = AutoConfig.from_pretrained(folder, **settings)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # one tensor for both sides of a tie: `fill` fills them at once
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def fill(model: torch.nn.Module, source: TensorSource) -> None:
    """Copy every tensor of `source` into `model`, slice by slice.

    Raises InputError if a parameter of the model is not in the source, or has another shape there.
    """
    targets = model.state_dict(keep_vars=True)
    aligned = align_to_model(source.tensors, model)
    filled = set()
    with torch.no_grad():
        for name, info in source.tensors.items():
            target = targets.get(aligned.get(name, name))
            if target is None:  # what the model computes by itself: rotary frequencies, GPT-2's masks
                continue
            if tuple(target.shape) != info.shape:
                raise InputError(
                    f"{name}: shape {info.shape} in the {source.kind} weights, "
                    f"but {tuple(target.shape)} by the model's config"
                )
            _copy(source, name, target.detach().view(-1))
            filled.add(target.data_ptr())
    missing = [name for name, target in targets.items() if target.data_ptr() not in filled]
    if missing:
        raise InputError(f"the {source.kind} weights lack {', '.join(missing)}")


def _copy(source: TensorSource, name: str, flat: torch.Tensor) -> None:
    for start in range(0, flat.numel(), _SLICE_ELEMENTS):
        stop = min(start + _SLICE_ELEMENTS, flat.numel())
        flat[start:stop].copy_(as_tensor(source.read(name, start, stop), source.tensors[name].dtype))
