"""Write any tensor source as a Hugging Face model folder: sharded safetensors, index, config and tokenizer.

Weights stream through in slices of a few MiB. A run that was killed goes on with the shard it was at; until
the last file is in place the folder carries a mark, by which readers refuse it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from pipeline.artifact import replacing, sync, write_json
from pipeline.context import Context
from pipeline.errors import InputError
from pipeline.weights.aside import sweep
from pipeline.weights.safetensors import INDEX, SafetensorsSource
from pipeline.weights.shard import Shard, ShardWriter, index_of, parse_size, plan_shards
from pipeline.weights.source import TensorInfo, TensorSource

SLICE_ELEMENTS = 1 << 20
INCOMPLETE = ".incomplete"
"""The mark of a model folder that is still being written, or whose writer was killed."""

_EXTRAS = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*.model",
    "*.tiktoken",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


def write_model(
    source: TensorSource,
    folder: Path,
    dtype: str,
    max_shard_size: str | int,
    extras_from: Path | None,
    context: Context | None = None,
) -> None:
    """Write `source` to `folder` as a model that `from_pretrained` loads.

    Args:
        source: Where the tensors come from. Its aliases (tied weights) are not written.
        folder: Made if absent. Shards of the same plan that a killed run left there are kept, and a finished
            model of the same tensors altogether: name folders by what goes into them.
        dtype: torch's name of the dtype that floating-point tensors are cast to, or `same`; others keep
            theirs.
        max_shard_size: Like `2GB`, or bytes.
        extras_from: The model folder whose config, generation config and tokenizer belong to these weights.
        context: For the progress bar.

    Raises:
        InputError: The disk is too full, `folder` holds other weights, or what belongs to `extras_from` is
            damaged or leads out of it.
    """
    if extras_from is not None:
        find_extras(extras_from)  # what may not be copied is said before anything is written
    tensors = converted(source, dtype)
    shards = plan_shards(tensors, parse_size(max_shard_size))
    if _is_finished(folder, tensors):
        return
    _claim(folder, shards)
    missing = [shard for shard in shards if not shard.is_written(folder)]
    require_free(folder, sum(shard.num_bytes for shard in missing))
    with (context or Context()).progress(
        f"writing {folder.name}", sum(shard.num_bytes for shard in missing) >> 20, "MiB"
    ) as progress:
        for shard in missing:
            write_shard(source, shard, folder)
            progress.advance(shard.num_bytes >> 20, shard.file_name)
    if len(shards) > 1:
        write_json(folder / INDEX, index_of(shards))
    if extras_from is not None:
        copy_extras(extras_from, folder, main_dtype(shards))
    (folder / INCOMPLETE).unlink(missing_ok=True)
    sync(folder)


def converted(source: TensorSource, dtype: str) -> list[TensorInfo]:
    """The tensors of `source` as they are to be written: floating-point ones in `dtype` (`same`: as they
    are).
    """
    return [
        TensorInfo(info.name, info.shape, dtype if info.is_floating and dtype != "same" else info.dtype)
        for info in source.tensors.values()
    ]


def write_shard(source: TensorSource, shard: Shard, folder: Path) -> None:
    """Write one shard of `source`, cast to the shard's dtypes, in slices of `SLICE_ELEMENTS`; what killed
    writers left goes.
    """
    import torch

    sweep(folder)
    with ShardWriter(folder / shard.file_name, shard.tensors) as writer:
        for info in shard.tensors:
            dtype = getattr(torch, info.dtype)
            for start in range(0, info.num_elements, SLICE_ELEMENTS):
                stop = min(start + SLICE_ELEMENTS, info.num_elements)
                writer.write_slice(info.name, start, source.read(info.name, start, stop).to(dtype))


def main_dtype(shards: Sequence[Shard]) -> str:
    """The floating-point dtype of most of the elements: what `config.json` calls the model's dtype."""
    count: Counter[str] = Counter()
    for shard in shards:
        for info in shard.tensors:
            count[info.dtype] += info.num_elements if info.is_floating else 0
    return count.most_common(1)[0][0]


def require_free(folder: Path, num_bytes: int) -> None:
    """Raises InputError unless the disk under `folder` (which need not be there yet) has `num_bytes` free."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise InputError(
            f"{folder}: {decimal(num_bytes)} are needed and {decimal(free)} are free; free some space or choose another disk"
        )


def free_bytes(folder: Path) -> int:
    """What is free on the disk under `folder`, or under what will hold it."""
    return shutil.disk_usage(
        next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    ).free


def _is_finished(folder: Path, tensors: Sequence[TensorInfo]) -> bool:
    if (folder / INCOMPLETE).exists() or not any(folder.glob("*.safetensors")):
        return False
    finished = SafetensorsSource(folder)
    finished.close()
    return finished.tensors == {info.name: info for info in tensors}


def _claim(folder: Path, shards: Sequence[Shard]) -> None:
    """Make the folder ours: mark it, and clear it of what a killed run with another shard size left. Others'
    weights are refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    planned = {shard.file_name for shard in shards} | ({INDEX} if len(shards) > 1 else set())
    stale = [path for path in folder.iterdir() if _is_weights(path) and path.name not in planned]
    foreign = [
        shard.file_name
        for shard in shards
        if (folder / shard.file_name).exists() and not shard.is_written(folder)
    ]
    mark = folder / INCOMPLETE
    if not mark.exists() and (stale or foreign):
        names = ", ".join(sorted({path.name for path in stale} | set(foreign)))
        raise InputError(f"{folder}: holds other weights ({names}); choose another folder or delete it")
    mark.touch()
    sync(folder)
    for path in [*stale, *(folder / name for name in foreign)]:
        path.unlink(missing_ok=True)
    sweep(folder)


def _is_weights(path: Path) -> bool:
    return path.suffix in _WEIGHTS or re.search(r"\.(safetensors|bin)\.index\.json$", path.name) is not None


def find_extras(folder: Path) -> list[Path]:
    """What belongs to a model besides its weights; `config.json`, if there is one, is last.

    Raises InputError for a link that leads to nothing, or out of the folder. (Links to weights are followed,
    for nothing but weights can be read there; these files are copied whatever they hold. The hub's cache,
    whose folders are made of links, is no way out.)
    """
    found = (
        path for pattern in _EXTRAS for path in sorted(folder.glob(pattern)) if path.suffix not in _WEIGHTS
    )
    extras = [path for path in [*dict.fromkeys(found), folder / "config.json"] if path.is_file()]
    _require_targets(folder)
    for path in extras:
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(os.path.realpath(folder)) and not _is_blob(target):
            raise InputError(
                f"{path}: is a link out of the model's folder, to {target}; put the file itself there"
            )
        if path.name == "config.json":
            _read_config(path)
    return extras


def _require_targets(folder: Path) -> None:
    """Refuse links to nothing, which `glob` and `is_file` take for no file at all."""
    if not folder.is_dir():
        return
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        is_extra = path.suffix not in _WEIGHTS and any(
            map(path.match, (*_EXTRAS, "additional_chat_templates", "config.json"))
        )
        if is_extra and path.is_symlink() and not path.exists():
            raise InputError(
                f"{path}: is a link to {os.readlink(path)}, which is not there; get the file again, or remove the link"
            )


def _is_blob(path: Path) -> bool:
    """Whether the hub's cache keeps a file's content at `path`: `models--NAME/blobs/DIGEST`, beside
    `models--NAME/snapshots/`.
    """
    return path.parent.name == "blobs" and (path.parent.parent / "snapshots").is_dir()


def copy_extras(source: Path, folder: Path, dtype: str) -> None:
    """Copy what belongs to a model besides its weights; `config.json`, last, says that they are `dtype`."""
    for path in find_extras(source):
        if path == source / "config.json":
            write_json(folder / path.name, _with_dtype(path, dtype))
        else:
            _copy(path, folder / path.relative_to(source))


def _read_config(path: Path) -> dict[str, Any]:
    """A config as it can be written again."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(config, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid JSON ({type(error).__name__}: {error}); repair it or get it again"
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a model's configuration; get it again")
    return config


def _with_dtype(path: Path, dtype: str) -> dict[str, Any]:
    config = _read_config(path)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return config | dict.fromkeys(keys, dtype)


def _copy(source: Path, target: Path) -> None:
    """Copy one file, whole or not at all."""
    with replacing(target) as out, source.open("rb") as data:
        shutil.copyfileobj(data, out)
