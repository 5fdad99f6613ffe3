"""Which files of a folder make up a model: one file, the shards of an index, or what matches a pattern."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError


@dataclass(frozen=True)
class WeightFiles:
    """The names of a model's files in `folder`, in order, and its index.

    The index is {tensor: file name}, empty where there is none.
    """

    folder: Path
    names: list[str]
    weight_map: dict[str, str]

    def require(self, tensors: Container[str]) -> None:
        """Raises InputError naming every tensor that the index promises and `tensors` lacks."""
        absent = [f"{name} ({file})" for name, file in self.weight_map.items() if name not in tensors]
        if absent:
            raise InputError(
                f"{self.folder}: the index names tensors that their shards do not hold: {', '.join(absent)}"
            )


def find_weight_files(path: Path, single: str, index: str, pattern: str) -> WeightFiles:
    """The files of the model at `path`.

    They are `path` itself, or in this folder `single`, else those of `index`, else those of `pattern`.

    That is the order transformers looks in. Raises InputError if there is none, or if shards are missing
    (naming all).
    """
    if path.is_file():
        return WeightFiles(path.parent, [path.name], {})
    weight_map: dict[str, str] = {}
    if (path / single).is_file():
        names = {single}
    elif (path / index).is_file():
        weight_map = read_index(path / index)
        names = set(weight_map.values())
    else:
        # Without an index a lost shard shows only in the names of its siblings.
        names = {shard for file in path.glob(pattern) for shard in _siblings(file.name)}
    if not names:
        raise InputError(f"{path}: no weights found; looked for {single}, {index} and {pattern}")
    absent = sorted(name for name in names if not (path / name).is_file())
    if absent:
        raise InputError(f"{path}: shards are missing: {', '.join(absent)}; get them again")
    return WeightFiles(path, sorted(names), weight_map)


def _siblings(name: str) -> Iterator[str]:
    """The names of all shards of `name`'s set, as in `model-00002-of-00003.safetensors`."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)", name)
    if not match:
        yield name
        return
    stem, _, count, suffix = match.groups()
    yield from (f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1))


def read_index(path: Path) -> dict[str, str]:
    """An index's {tensor name: file name}. File names that lead out of the folder are refused."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON index ({type(error).__name__}); get it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: has no weight_map; it is not an index of shards")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_file_name(file):
            raise InputError(f"{path}: {name!r} lies in {file!r}, which is not a file name inside the folder")
    return weight_map


def _is_file_name(text: str) -> bool:
    return text not in ("", ".", "..") and not any(character in text for character in "/\\\0")
