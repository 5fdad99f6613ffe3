"""What a training leaves: a Hugging Face folder or a PEFT adapter, streamed from the fp32 masters of its last
checkpoint.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.artifact import write_json
from pipeline.context import Context
from pipeline.train.lora import is_adapter, saved_name
from pipeline.weights.open import open_source
from pipeline.weights.shard import Shard
from pipeline.weights.source import TensorInfo, TensorSource
from pipeline.weights.writer import write_model, write_shard

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

_SHARD_SIZE = "5GB"


def write_full(checkpoint: Path, folder: Path, base: Path, context: Context) -> None:
    """Write the whole model in fp32 to `folder`, with the config and tokenizer of the model folder `base`."""
    with closing(open_source(checkpoint)) as source:
        write_model(source, folder, "float32", _SHARD_SIZE, extras_from=base, context=context)


def write_adapter(
    checkpoint: Path, folder: Path, config: LoraConfig, base: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the adapter in fp32 to `folder` as PEFT does; `base` is the model folder that its config
    names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with closing(open_source(checkpoint)) as source:
        renamed = _Renamed(source)
        write_shard(renamed, Shard("adapter_model.safetensors", tuple(renamed.tensors.values())), folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "adapter_config.json", _described(config, base))


def _described(config: LoraConfig, base: Path) -> dict[str, Any]:
    """PEFT's own form, but with its sets in one order always."""
    fields = config.to_dict() | {"base_model_name_or_path": str(base), "inference_mode": True}
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in sorted(fields.items())
    }


class _Renamed:
    """A checkpoint's trained tensors under the names of PEFT's file."""

    def __init__(self, source: TensorSource) -> None:
        self.kind = source.kind
        self.aliases: dict[str, str] = {}
        self._source = source
        self._names = {saved_name(name): name for name in source.tensors if is_adapter(name)}
        self.tensors = {
            new: TensorInfo(new, source.tensors[old].shape, source.tensors[old].dtype)
            for new, old in self._names.items()
        }

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._source.read(self._names[name], start, stop)

    def close(self) -> None:
        self._source.close()
