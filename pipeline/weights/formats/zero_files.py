"""The files of a DeepSpeed ZeRO checkpoint: found, opened without running them, checked to be of one save.

Format (DeepSpeed 0.19): `<save_dir>/latest` names a tag folder. In it, per rank r,
`[bf16_]zero_pp_rank_{r}_mp_rank_00_optim_states.pt` holds the fp32 masters, and `mp_rank_00_model_states.pt`
(stages 1, 2) or `zero_pp_rank_{r}_mp_rank_00_model_states.pt` (stage 3) the names, shapes, buffers and frozen
parameters. A universal checkpoint (`ds_to_universal`) has the same model states, and
`zero/<parameter>/fp32.pt` for the masters.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import InputError
from pipeline.weights.formats.torch_file import ShapedTensor, TorchFile
from pipeline.weights.io.pread import PreadFile
from pipeline.weights.source import DTYPE_BYTES
from pipeline.weights.stored import StoredTensor

T = TypeVar("T")

_LATEST = ("latest", "latest_universal")
_FORMATS = {"float64": "<d", "float32": "<f", "float16": "<e", "bfloat16": "<f", "bool": "<?"}
"""struct's name for one number that is no integer."""
_OPTIM = re.compile(
    r"(?:bf16_)?(?P<expert>exp)?(?:zero_)?pp_rank_(?P<rank>\d+)_mp_rank_(?P<model_rank>\d+)_optim_states\.pt"
)


@dataclass(frozen=True)
class ZeroFiles:
    """A checkpoint's files.

    Lists are by rank. `models` has one entry at stages 1 and 2, `optims` none in a universal checkpoint.
    """

    folder: Path
    kind: str
    """`zero-1`, `zero-2`, `zero-3` or `universal`."""
    optims: list[dict[str, Any]]
    models: list[dict[str, Any]]
    files: list[PreadFile]

    @property
    def world_size(self) -> int:
        """How many ranks saved it; 1 for a universal checkpoint of stages 1 and 2, which does not depend on
        it.
        """
        return len(self.optims) or len(self.models)


def is_zero_folder(path: Path) -> bool:
    """Whether `path` looks like a DeepSpeed checkpoint: a tag folder, or a save folder with `latest`."""
    return (
        any((path / name).is_file() for name in _LATEST)
        or any(path.glob("*_optim_states.pt"))
        or any(path.glob("*mp_rank_*_model_states.pt"))
    )


def open_zero_files(path: Path) -> ZeroFiles:
    """Open a tag folder, or the one that `latest` names in a save folder.

    Raises InputError for missing ranks, files of different saves side by side, truncated files, and for
    layouts that are not read: stage 0, tensor or expert parallelism, round-robin gradients.
    """
    folder = _tag_folder(path)
    if (folder / "zero").is_dir():
        return _open_universal(folder)
    optim_files = [TorchFile(file) for file in _optim_paths(folder)]
    optims = [required(file, file.content, "optimizer_state_dict", dict) for file in optim_files]
    stage = _stage(optim_files[0], optims[0])
    model_files = [TorchFile(file) for file in _model_paths(folder, stage, len(optims))]
    models = [_mapping(file) for file in model_files]
    # A killed save leaves files of two steps side by side, each of them whole.
    _require_all_ranks(folder, optims[0], len(optims))
    _require_one_save(optim_files, optims, model_files)
    for file in [*optim_files, *model_files]:
        _require_plain_layout(file, stage)
    return ZeroFiles(
        folder, f"zero-{stage}", optims, models, [file.file for file in [*optim_files, *model_files]]
    )


def _open_universal(folder: Path) -> ZeroFiles:
    whole = folder / "mp_rank_00_model_states.pt"
    num_ranks = len(list(folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt")))
    paths = [whole] if whole.is_file() or not num_ranks else _model_paths(folder, 3, num_ranks)
    files = [TorchFile(path) for path in paths]
    models = [_mapping(file) for file in files]
    if paths != [whole]:
        _require_all_ranks(folder, {"partition_count": models[0].get("dp_world_size")}, num_ranks)
    _require_same(files, [model.get("global_steps") for model in models], "step")
    for file in files:
        _require_plain_layout(file, 3)
    return ZeroFiles(folder, "universal", [], models, [file.file for file in files])


def _tag_folder(path: Path) -> Path:
    latest = next((path / name for name in _LATEST if (path / name).is_file()), None)
    if latest is None:
        return path
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not tag or "/" in tag or tag in (".", ".."):
        raise InputError(
            f"{latest}: names no folder ({tag!r}); a save was cut short, so give the folder of an earlier one"
        )
    if not (path / tag).is_dir():
        raise InputError(f"{latest}: names {tag!r}, which is not there")
    return path / tag


def _optim_paths(folder: Path) -> list[Path]:
    """The ranks' files in the order of their ranks."""
    paths: dict[int, Path] = {}
    for path in sorted(folder.glob("*_optim_states.pt")):
        match = _OPTIM.fullmatch(path.name)
        if not match or match["expert"] or int(match["model_rank"]):
            raise InputError(f"{path}: of a tensor- or expert-parallel run, which is not supported")
        other = paths.setdefault(int(match["rank"]), path)
        if other != path:
            raise InputError(f"{path}: {other.name} is of the same rank; files of different saves are mixed")
    if not paths:
        raise InputError(
            f"{folder}: has no *_optim_states.pt, as of ZeRO stage 0 or no DeepSpeed checkpoint;"
            " it holds no fp32 masters"
        )
    absent = list(
        islice((rank for rank in count() if rank not in paths), min(max(paths) + 1 - len(paths), 20))
    )
    if absent:
        raise InputError(f"{folder}: the files of ranks {', '.join(map(str, absent))} are missing")
    return [paths[rank] for rank in sorted(paths)]


def _model_paths(folder: Path, stage: int, world_size: int) -> list[Path]:
    if stage < 3:
        return [folder / "mp_rank_00_model_states.pt"]
    return [folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size)]


def _stage(file: TorchFile, optim: dict[str, Any]) -> int:
    if "zero_stage" not in optim and "single_partition_of_fp32_groups" in optim:
        return 1  # DeepSpeed's BF16_Optimizer (bf16 with fp32 gradients at stage 1) leaves it out
    stage = required(file, optim, "zero_stage", int)
    if stage not in (1, 2, 3):
        raise InputError(f"{file.file.path}: of ZeRO stage {stage}; stages 1, 2 and 3 are read")
    return stage


def _require_all_ranks(folder: Path, optim: dict[str, Any], num_files: int) -> None:
    counts = optim.get("partition_count")
    counts = counts if isinstance(counts, list) else [counts]
    if any(number != counts[0] for number in counts):
        raise InputError(
            f"{folder}: its parameter groups are split over {_text(counts)} ranks;"
            " expert parallelism is not supported"
        )
    if counts[:1] != [num_files]:
        raise InputError(
            f"{folder}: was saved by {_text(counts[:1])} ranks, but has the files of {num_files};"
            " some are missing or stale"
        )


def _require_one_save(
    optim_files: list[TorchFile], optims: list[dict[str, Any]], model_files: list[TorchFile]
) -> None:
    """The same DeepSpeed, layout, global step and optimizer step everywhere, as far as each file tells."""
    _require_same(optim_files, [file.content.get("ds_version") for file in optim_files], "DeepSpeed version")
    _require_same(optim_files, [optim.get("zero_stage") for optim in optims], "ZeRO stage")
    _require_same(optim_files, [optim.get("partition_count") for optim in optims], "number of ranks")
    _require_same(optim_files, [_optimizer_steps(optim) for optim in optims], "optimizer step")
    _require_same(model_files, [file.content.get("global_steps") for file in model_files], "step")
    _require_same(
        [optim_files[0], *model_files],
        [file.content.get("ds_version") for file in [optim_files[0], *model_files]],
        "DeepSpeed version",
    )


def _require_same(files: list[TorchFile], values: list[Any], what: str) -> None:
    for file, value in zip(files, values, strict=True):
        if value != values[0]:
            difference = f"has the {what} {_text(value)}, {files[0].file.path.name} has {_text(values[0])}"
            raise InputError(f"{file.file.path}: {difference}; files of different saves are mixed")


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _optimizer_steps(optim: dict[str, Any]) -> list[float]:
    """The distinct step counts in an optimizer's state: one where all is well."""
    inner = table(optim.get("base_optimizer_state", optim.get("optimizer_state_dict")))
    states = [table(state) for state in table(inner.get("state")).values()]
    return sorted({_number(state["step"]) for state in states if "step" in state})


def _number(value: Any) -> float:
    if isinstance(value, ShapedTensor) and value.stored.num_elements == 1:
        return _stored_number(value.stored)
    # A pickle may hold an integer that no float holds.
    is_number = isinstance(value, (int, float)) and abs(value) < 1 << 63
    return float(value) if is_number else -1.0


def _stored_number(stored: StoredTensor) -> float:
    """The only element, from its bytes: importing torch takes longer than all else that is read here."""
    [piece] = stored.pieces
    read = piece.file.read_bytes(piece.offset, DTYPE_BYTES[stored.dtype])
    if "int" in stored.dtype:
        return float(int.from_bytes(read, "little", signed=stored.dtype != "uint8"))
    if stored.dtype == "bfloat16":
        read = bytes(2) + read  # the upper half of a float32
    return float(struct.unpack(_FORMATS[stored.dtype], read)[0])


def _require_plain_layout(file: TorchFile, stage: int) -> None:
    content = file.content
    zero = table(table(content.get("ds_config")).get("zero_optimization"))
    if stage < 3 and zero.get("round_robin_gradients"):
        raise InputError(
            f"{file.file.path}: saved with round_robin_gradients, whose layout is not recorded;"
            " train without it"
        )
    if content.get("mp_world_size", 1) != 1:
        raise InputError(
            f"{file.file.path}: of a tensor-parallel run over {content['mp_world_size']} ranks,"
            " which is not supported"
        )


def _mapping(file: TorchFile) -> dict[str, Any]:
    if not isinstance(file.content, dict):
        raise InputError(f"{file.file.path}: is not a DeepSpeed checkpoint's file")
    return file.content


def table(value: Any) -> dict[Any, Any]:
    """`value` if it is a table, else an empty one: for parts that a checkpoint may lack."""
    return value if isinstance(value, dict) else {}


def required(file: TorchFile, content: Any, name: str, kind: type[T]) -> T:
    """`content[name]`. Raises InputError unless it is there and a `kind`."""
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, kind):
        raise InputError(
            f"{file.file.path}: has no {name!r}, so DeepSpeed did not write it, or it is damaged"
        )
    return value
