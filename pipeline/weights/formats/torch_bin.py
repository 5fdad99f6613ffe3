"""A folder of `pytorch_model*.bin`, or one such file, as a tensor source; no pickle is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import InputError
from pipeline.weights.formats.layout import find_weight_files
from pipeline.weights.formats.torch_file import ShapedTensor, TorchFile
from pipeline.weights.stored import StoredSource

SINGLE = "pytorch_model.bin"
INDEX = SINGLE + ".index.json"


class TorchBinSource(StoredSource):
    """The tensors of torch state dicts on the disk. Names that share one storage are aliases of the first."""

    kind = "torch"

    def __init__(self, path: Path) -> None:
        """Raises InputError for a damaged or foreign file, and for what the index names but is absent."""
        super().__init__(path)
        files = find_weight_files(path, SINGLE, INDEX, "pytorch_model*.bin")
        owners: dict[ShapedTensor, str] = {}
        for name in files.names:
            self._add_file(TorchFile(files.folder / name), files.weight_map, owners)
        files.require(self.tensors.keys() | self.aliases.keys())

    def _add_file(self, file: TorchFile, weight_map: dict[str, str], owners: dict[ShapedTensor, str]) -> None:
        path = file.file.path
        self._files.append(file.file)
        for name, tensor in _state_dict(file).items():
            if weight_map.get(name, path.name) != path.name:
                continue
            if name in self.tensors or name in self.aliases:
                raise InputError(
                    f"{path}: holds {name!r}, which another file of the folder holds too;"
                    " remove one of the files"
                )
            owner = owners.setdefault(tensor, name) if tensor.stored.num_elements else name
            if owner == name:
                self.add(name, tensor.shape, tensor.stored)
            else:
                self.tie(name, owner)


def _state_dict(file: TorchFile) -> Mapping[str, ShapedTensor]:
    content = file.content
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise InputError(f"{file.file.path}: does not hold a state dict (a table of named tensors)")
    foreign = [name for name, value in content.items() if not isinstance(value, ShapedTensor)]
    if foreign or not content:
        raise InputError(
            f"{file.file.path}: not a model's state dict: {', '.join(map(repr, foreign)) or 'it is empty'}"
        )
    return content
