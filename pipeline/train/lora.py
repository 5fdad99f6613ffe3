"""LoRA by PEFT: where its matrices go, and their first values, which depend on the seed alone."""

from __future__ import annotations

import hashlib
import warnings
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import InputError
from pipeline.training_config import LoraTraining
from pipeline.weights.floats import Array
from pipeline.weights.source import TensorInfo

if TYPE_CHECKING:
    from peft import LoraConfig

_ADAPTER = "default"
"""PEFT's name of the one adapter in a model."""


def lora_config(model: Any, settings: LoraTraining) -> LoraConfig:
    """PEFT's config for `model` (which may lie on the meta device).

    Raises InputError if its modules to adapt are not known, not in it, or cannot be adapted.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    names = settings.target_modules or _query_and_value(model)
    found = {name: _modules_named(model, name) for name in names}
    absent = [name for name, modules in found.items() if not modules]
    if absent:
        raise InputError(f"lora.target_modules: the model has no module named {', '.join(absent)}")
    for name, modules in found.items():
        _require_adaptable(model, name, modules)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=sorted(names),
        # Conv1D (GPT-2) stores its matrix transposed.
        fan_in_fan_out=all(isinstance(module, Conv1D) for modules in found.values() for module in modules),
    )


def _modules_named(model: Any, name: str) -> list[torch.nn.Module]:
    return [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]


def _require_adaptable(model: Any, name: str, modules: list[torch.nn.Module]) -> None:
    from transformers.pytorch_utils import Conv1D

    embeddings = model.get_input_embeddings().weight
    for module in modules:
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            raise InputError(f"lora.target_modules: {name} is a {type(module).__name__}; name linear modules")
        if module.weight is embeddings:
            raise InputError(
                f"lora.target_modules: {name} shares its weights with the input embeddings; leave it out"
            )


def _query_and_value(model: Any) -> list[str]:
    """The attention's query and value projections, as in the paper, or the one module that has them both."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = model.config.model_type
    if kind not in KNOWN:
        raise InputError(
            f"lora.target_modules: not known for {kind} models; name the linear modules to adapt"
        )
    return list(KNOWN[kind])


def add_adapter(model: Any, config: LoraConfig) -> Any:
    """`model` with all its weights frozen and an adapter added, in the weights' own dtype."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft 0.21 asks transformers for what that calls by another name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config, adapter_name=_ADAPTER, autocast_adapter_dtype=False)


class InitialAdapter:
    """The adapter's first values as a tensor source: A uniform as in PEFT, B zero, so it begins as no change.

    Each matrix has a generator of its own, seeded by its name: no rank, ZeRO stage or precision changes it.
    """

    kind = "initial adapter"

    def __init__(self, model: torch.nn.Module, seed: int) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._seed = seed
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # under ZeRO-3 its own shape is (0,)
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                self.tensors[name] = TensorInfo(name, shape, "float32")

    def read(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        """As `TensorSource.read`."""
        values = self._values(name, start, stop).numpy()
        if out is None:
            return values
        out[:] = values
        return out

    def _values(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.tensors[name]
        if ".lora_B." in name:
            return torch.zeros(stop - start)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        bound = 1 / sqrt(info.shape[1])
        return (torch.rand(info.num_elements, generator=generator) * 2 * bound - bound)[start:stop]

    def close(self) -> None:
        """Nothing is held."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is one of LoRA's matrices."""
    return ".lora_A." in name or ".lora_B." in name


def saved_name(name: str) -> str:
    """A trained parameter's name in PEFT's file: without the adapter's name."""
    return name.replace(f".{_ADAPTER}.", ".")
