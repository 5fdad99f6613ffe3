"""A DeepSpeed checkpoint (ZeRO-1, 2, 3, universal) as a tensor source: its fp32 masters, read in place.

Nothing is consolidated, and DeepSpeed is not imported. How the masters are laid out:

- Stages 1 and 2: each parameter group is one flat tensor, cut into a partition a rank wherever that falls.
- Stage 3: every parameter is cut into one part a rank, and a rank's parts follow each other through its
  sub-groups. What pads a part is whatever was in memory, and must never be read.
- Universal: a file for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, prod
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.weights.formats.torch_file import ShapedTensor, TorchFile
from pipeline.weights.formats.zero_files import ZeroFiles, open_zero_files, table
from pipeline.weights.stored import StoredSource, StoredTensor, join

Shape = tuple[int, ...]

_STAGE = {"zero-1": 1, "zero-2": 2, "zero-3": 3}


class ZeroSource(StoredSource):
    """The parameters of a ZeRO checkpoint, under the names they had in the running model.

    Trained parameters are float32 masters; frozen ones and buffers have the dtype the model ran in.
    """

    def __init__(self, path: Path) -> None:
        """`path`: a tag folder, or a save folder with `latest`.

        Raises InputError as `open_zero_files`, and if sizes do not add up.
        """
        files = open_zero_files(path)
        super().__init__(files.folder)
        self.kind = files.kind
        self.stage = _STAGE.get(files.kind)
        self.world_size = files.world_size
        self.global_steps: int | None = files.models[0].get("global_steps")
        self._files = files.files
        try:
            self._enter(files)
        except InputError:
            raise
        except (
            TypeError,
            AttributeError,
            ValueError,
            LookupError,
        ) as error:  # tables that hold what DeepSpeed never writes
            raise InputError(f"{self.path}: damaged ({error})".splitlines()[0]) from error

    def _enter(self, files: ZeroFiles) -> None:
        masters = _MASTERS[files.kind]
        for name, shape, stored in [*_buffers(files), *_frozen(files), *masters(files)]:
            self.add(name, shape, stored)
        shared = table(files.models[0].get("shared_params"))  # rank 0's file alone has them
        # Named masters first: the 16-bit module has rounded copies of the same parameters.
        for name, tensor in _unnamed_frozen(files):
            if name not in self.tensors and name not in shared:
                self.add(name, tensor.shape, tensor.stored)
        for alias, owner in shared.items():
            if owner in self.tensors and alias not in self.tensors:
                self.tie(alias, owner)


def _shapes(files: ZeroFiles, name: str) -> list[dict[str, Shape]]:
    """`param_shapes` (a dict per group) or `frozen_param_shapes` (one dict or None), checked."""
    groups = files.models[0].get(name)
    groups = groups if isinstance(groups, list) else [groups or {}]
    for group in groups:
        if not isinstance(group, dict) or not all(
            isinstance(key, str) and _is_shape(shape) for key, shape in group.items()
        ):
            raise InputError(f"{files.folder}: the {name} in its model states are damaged")
    return groups


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(size) is int and size >= 0 for size in value)


def _flats(files: ZeroFiles, rank: int, key: str) -> list[StoredTensor]:
    """The flat fp32 tensors of one rank: one per group (stages 1, 2) or sub-group (stage 3)."""
    flats = files.optims[rank].get(key)
    if not isinstance(flats, list) or not all(isinstance(flat, ShapedTensor) for flat in flats):
        raise InputError(
            f"{files.folder}: rank {rank}'s file has no {key}; it was offloaded to NVMe, stripped,"
            " or is damaged"
        )
    return [flat.stored for flat in flats]


def _stage_1_2(files: ZeroFiles) -> Iterator[tuple[str, Shape, StoredTensor]]:
    groups = _shapes(files, "param_shapes")
    ranks = [_flats(files, rank, "single_partition_of_fp32_groups") for rank in range(files.world_size)]
    paddings = files.optims[0].get("param_alignment_paddings") or [None] * len(groups)
    if not all(len(flats) == len(groups) for flats in [*ranks, paddings]):
        raise InputError(
            f"{files.folder}: its files disagree on the number of parameter groups;"
            " files of different saves are mixed"
        )
    for i, (shapes, padding) in enumerate(zip(groups, paddings, strict=True)):
        yield from _group(files, shapes, join(flats[i] for flats in ranks), padding or [0] * len(shapes))


def _group(
    files: ZeroFiles, shapes: dict[str, Shape], flat: StoredTensor, paddings: list[int]
) -> Iterator[tuple[str, Shape, StoredTensor]]:
    """The parameters of one group, which is `flat` over all ranks.

    They come in order, each followed by its padding, then the tail's padding.
    """
    if len(paddings) != len(shapes) or not all(type(padding) is int and padding >= 0 for padding in paddings):
        raise InputError(
            f"{files.folder}: its param_alignment_paddings do not fit its param_shapes; the files are damaged"
        )
    total = sum(map(prod, shapes.values())) + sum(paddings)
    unit = 2 * files.world_size  # DeepSpeed pads a group to a multiple of this; the file may have it or not
    if flat.num_elements < total - (paddings or [0])[-1] or ceil(flat.num_elements / unit) != ceil(
        total / unit
    ):
        raise InputError(
            f"{files.folder}: a parameter group needs {total} elements,"
            f" its partitions have {flat.num_elements}; files are mixed"
        )
    offset = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        yield name, shape, flat.slice(offset, offset + prod(shape))
        offset += prod(shape) + padding


def _stage_3(files: ZeroFiles) -> Iterator[tuple[str, Shape, StoredTensor]]:
    ranks = [join(_flats(files, rank, "fp32_flat_groups")) for rank in range(files.world_size)]
    shapes = {name: shape for group in _shapes(files, "param_shapes") for name, shape in group.items()}
    total = sum(_part(shape, files.world_size) for shape in shapes.values())
    for rank, flat in enumerate(ranks):
        if flat.num_elements != total:
            raise InputError(
                f"{files.folder}: rank {rank}'s partition has {flat.num_elements} elements instead of"
                f" {total}; files are mixed"
            )
    offset = 0
    for name, shape in shapes.items():
        part = _part(shape, files.world_size)
        # Each rank holds as much, and only the last one's end is padding: joined, it lies behind the values.
        padded = join(flat.slice(offset, offset + part) for flat in ranks)
        yield name, shape, padded.slice(0, prod(shape))
        offset += part


def _universal(files: ZeroFiles) -> Iterator[tuple[str, Shape, StoredTensor]]:
    for name, shape in (item for group in _shapes(files, "param_shapes") for item in group.items()):
        if "/" in name or name.startswith("."):
            raise InputError(f"{files.folder}: a parameter is named {name!r}, which is not a folder's name")
        file = TorchFile(files.folder / "zero" / name / "fp32.pt")
        files.files.append(file.file)
        tensor = file.content.get("param") if isinstance(file.content, dict) else file.content
        if not isinstance(tensor, ShapedTensor):
            raise InputError(f"{file.file.path}: holds no tensor; convert the checkpoint again")
        yield name, shape, tensor.stored


_MASTERS: dict[str, Callable[[ZeroFiles], Iterator[tuple[str, Shape, StoredTensor]]]] = {
    "zero-1": _stage_1_2,
    "zero-2": _stage_1_2,
    "zero-3": _stage_3,
    "universal": _universal,
}


def _part(shape: Shape, world_size: int) -> int:
    """How many elements of a parameter each rank holds at stage 3, padding included."""
    return ceil(prod(shape) / world_size)


def _frozen(files: ZeroFiles) -> Iterator[tuple[str, Shape, StoredTensor]]:
    """Parameters that were not trained.

    At stages 1 and 2 the model states hold them whole, at stage 3 each rank's hold a part.

    A checkpoint saved without them (`exclude_frozen_parameters`) has none.
    """
    for name, shape in _shapes(files, "frozen_param_shapes")[0].items():
        padded = join(_fragment(files, model, name) for model in files.models)
        if padded.num_elements < prod(shape):
            raise InputError(
                f"{files.folder}: frozen {name!r} has {padded.num_elements} of {prod(shape)} elements;"
                " files are mixed"
            )
        yield name, shape, padded.slice(0, prod(shape))


def _unnamed_frozen(files: ZeroFiles) -> Iterator[tuple[str, ShapedTensor]]:
    """The 16-bit module: at stage 1 only it has frozen parameters. At stage 3 it has empty placeholders."""
    for name, tensor in table(files.models[0].get("module")).items():
        if isinstance(name, str) and isinstance(tensor, ShapedTensor) and tensor.stored.num_elements:
            yield name, tensor


def _fragment(files: ZeroFiles, model: dict[str, Any], name: str) -> StoredTensor:
    fragment = table(model.get("frozen_param_fragments")).get(name)
    if not isinstance(fragment, ShapedTensor):
        raise InputError(
            f"{files.folder}: the frozen parameter {name!r} is missing from its model states;"
            " the files are damaged or mixed"
        )
    return fragment.stored


def _buffers(files: ZeroFiles) -> Iterator[tuple[str, Shape, StoredTensor]]:
    module = table(files.models[0].get("module"))
    for name in files.models[0].get("buffer_names") or []:
        buffer = module.get(name)
        if isinstance(buffer, ShapedTensor):
            yield name, buffer.shape, buffer.stored
