"""A folder of `pytorch_model*.bin` (or one such file) as a tensor source: no pickle is run, no tensor is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import InputError
from pipeline.weights.safetensors import read_index, require_files, require_tensors
from pipeline.weights.stored import StoredSource
from pipeline.weights.torch_file import ShapedTensor, TorchFile

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


class TorchBinSource(StoredSource):
    """The tensors of torch state dicts on the disk. Names that share one storage are aliases of the first."""

    kind = "torch"

    def __init__(self, path: Path) -> None:
        """Raises InputError for a damaged or foreign file, and for shards or tensors that the index names but that are absent."""
        super().__init__()
        folder, names, weight_map = _layout(path)
        require_files(folder, names)
        owners: dict[ShapedTensor, str] = {}
        for name in names:
            self._add_file(TorchFile(folder / name), weight_map, owners)
        require_tensors(path, self.tensors.keys() | self.aliases.keys(), weight_map)

    def _add_file(self, file: TorchFile, weight_map: dict[str, str], owners: dict[ShapedTensor, str]) -> None:
        path = file.file.path
        self._files.append(file.file)
        for name, tensor in _state_dict(file).items():
            if weight_map.get(name, path.name) != path.name:
                continue
            if name in self.tensors or name in self.aliases:
                raise InputError(f"{path}: holds {name!r}, which another file of the folder holds too; remove one of the files")
            owner = owners.setdefault(tensor, name) if tensor.stored.num_elements else name
            if owner == name:
                self.add(name, tensor.shape, tensor.stored)
            else:
                self.aliases[name] = owner


def _layout(path: Path) -> tuple[Path, list[str], dict[str, str]]:
    if path.is_file():
        return path.parent, [path.name], {}
    if (path / SINGLE).is_file():
        return path, [SINGLE], {}
    if (path / INDEX).is_file():
        weight_map = read_index(path / INDEX)
        return path, sorted(set(weight_map.values())), weight_map
    names = sorted(file.name for file in path.glob("pytorch_model*.bin"))
    if not names:
        raise InputError(f"{path}: holds no {SINGLE} and no {INDEX}")
    return path, names, {}


def _state_dict(file: TorchFile) -> Mapping[str, ShapedTensor]:
    content = file.content
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise InputError(f"{file.file.path}: does not hold a state dict (a table of named tensors)")
    foreign = [name for name, value in content.items() if not isinstance(value, ShapedTensor)]
    if foreign or not content:
        raise InputError(f"{file.file.path}: not a model's state dict: {', '.join(foreign) or 'it is empty'}")
    return content
