"""What a training leaves: a model folder or a PEFT adapter, streamed from its last checkpoint's masters."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.context import Context, Progress
from pipeline.train.lora import is_adapter, saved_name
from pipeline.weights.cast import Cast
from pipeline.weights.extras import render_extras
from pipeline.weights.floats import Array
from pipeline.weights.folder_writer import Content, write_folder
from pipeline.weights.formats.adapter_config import FILE_NAME
from pipeline.weights.formats.open import open_source
from pipeline.weights.journal import Journal
from pipeline.weights.shard import Shard, parse_size, plan_shards
from pipeline.weights.source import TensorSource

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

MODEL, ADAPTER = "model", "adapter"
"""The folders that a training leaves in its own."""

_SHARD_SIZE = "5GB"
_DTYPE = "float32"


def write_full(checkpoint: Path, folder: Path, base: Path, context: Context) -> None:
    """Write the whole model in fp32 to `folder`, with the config and tokenizer of the model folder `base`.

    Raises InputError if the disk is too full.
    """
    max_shard_bytes = parse_size(_SHARD_SIZE)
    _clear(folder)
    with closing(Cast(open_source(checkpoint), _DTYPE)) as source:
        shards = plan_shards(source.tensors.values(), max_shard_bytes)
        content = Content(
            shards, render_extras(base, _DTYPE), _recipe(folder, max_shard_bytes=max_shard_bytes)
        )
        with Progress("writing the model", "bytes", shown=context.is_main) as progress:
            write_folder(source, folder, content, progress=progress)


def write_adapter(
    checkpoint: Path, folder: Path, config: LoraConfig, base: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the adapter in fp32 to `folder` as PEFT does; its config names the model folder `base`."""
    _clear(folder)
    with closing(Cast(_Renamed(open_source(checkpoint)), _DTYPE)) as source:
        shard = Shard("adapter_model.safetensors", tuple(source.tensors.values()))
        extras = _tokenizer_files(tokenizer) | {FILE_NAME: _described(config, base)}
        write_folder(source, folder, Content([shard], extras, _recipe(folder)))


def discard(out: Path) -> None:
    """Remove what was begun in a training's folder `out`: a new training may end in other bits."""
    for name in (MODEL, ADAPTER):
        shutil.rmtree(out / name, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what an older flearn began here in another way: the training's folder is ours alone."""
    journal = Journal(folder)
    if journal.recipe is None and journal.manifest is None:
        shutil.rmtree(folder, ignore_errors=True)


def _recipe(folder: Path, **fields: Any) -> dict[str, Any]:
    """A training's artifact is named by all that decides its result, and `discard` sees to the rest."""
    return {"artifact": folder.parent.name, "dtype": _DTYPE, **fields}


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _described(config: LoraConfig, base: Path) -> bytes:
    """PEFT's own form, but with its sets in one order always."""
    fields = config.to_dict() | {"base_model_name_or_path": str(base), "inference_mode": True}
    ordered = {
        name: sorted(value) if isinstance(value, set) else value for name, value in sorted(fields.items())
    }
    return (json.dumps(ordered, indent=2, ensure_ascii=False) + "\n").encode()


class _Renamed:
    """A checkpoint's trained tensors under the names of PEFT's file."""

    def __init__(self, source: TensorSource) -> None:
        self.kind = source.kind
        self.aliases: dict[str, str] = {}
        self._source = source
        self._names = {saved_name(name): name for name in source.tensors if is_adapter(name)}
        self.tensors = {new: replace(source.tensors[old], name=new) for new, old in self._names.items()}

    def read(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        return self._source.read(self._names[name], start, stop, out)

    def close(self) -> None:
        self._source.close()
