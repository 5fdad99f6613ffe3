"""LoRA's target modules, looked for when an experiment is planned: the fine-tuning may start hours later.

A file of its own: planning imports no torch, which lora.py needs.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from pipeline.training_config import LoraTraining
from pipeline.weights.formats.safetensors import SafetensorsSource


def require(folder: Path, settings: LoraTraining) -> None:
    """Raise InputError if the modules that `settings` name are not in `folder`'s model, or cannot be adapted.

    So too if its config has values of a wrong kind. Usually the names of the stored matrices, which need no
    torch, show that all is well.
    """
    matrices = _matrices(folder)
    wanted = settings.target_modules or []
    if all(_has_module(matrices, name) for name in wanted):
        return
    # A model may be stored under other names, or not be here but for its config: it knows its modules itself.
    from pipeline.models.check import unusable_config
    from pipeline.train.lora import lora_config
    from pipeline.train.model import skeleton

    try:
        model = skeleton(folder)
    except (OSError, ValueError):
        return  # the model's stage says what is wrong with it
    except Exception as error:
        raise unusable_config(folder / "config.json", error) from None
    lora_config(model, settings)


def _has_module(matrices: list[str], name: str) -> bool:
    return any(matrix.endswith(f".{name}.weight") for matrix in matrices)


def _matrices(folder: Path) -> list[str]:
    if not any(folder.glob("*.safetensors")):
        return []
    with closing(SafetensorsSource(folder)) as source:
        return [f".{name}" for name, info in source.tensors.items() if len(info.shape) == 2]
