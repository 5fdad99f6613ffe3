"""LoRA's target modules, looked for when an experiment is planned: on a cluster the first fine-tuning may
start hours later.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from pipeline.config import LoraTraining
from pipeline.weights.formats.safetensors import SafetensorsSource


def require(folder: Path, settings: LoraTraining) -> None:
    """Raises InputError if the modules that `settings` name are not in the model in `folder`, or cannot be
    adapted, or its config has values of a wrong kind.

    The names of the stored matrices, which need no torch, usually show that they are.
    """
    matrices = _matrices(folder)
    if all(
        any(matrix.endswith(f".{name}.weight") for matrix in matrices)
        for name in settings.target_modules or []
    ):
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


def _matrices(folder: Path) -> list[str]:
    if not any(folder.glob("*.safetensors")):
        return []
    with closing(SafetensorsSource(folder)) as source:
        return [f".{name}" for name, info in source.tensors.items() if len(info.shape) == 2]
