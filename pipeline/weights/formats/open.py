"""Open whatever a path holds as a tensor source."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import InputError
from pipeline.weights.formats.adapter import is_adapter
from pipeline.weights.formats.safetensors import SafetensorsSource
from pipeline.weights.formats.torch_bin import TorchBinSource
from pipeline.weights.formats.zero import ZeroSource
from pipeline.weights.formats.zero_files import is_zero_folder
from pipeline.weights.journal import INCOMPLETE
from pipeline.weights.names import align_to_base
from pipeline.weights.source import TensorSource
from pipeline.weights.stored import StoredSource

_OF_LORA = re.compile(r"(^|\.)(lora_[AB]|lora_embedding_[AB]|base_layer)(\.|$)")
"""PEFT's names inside a running model, and of an adapter's factors."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TORCH_TYPES = (".bin", ".pt", ".pth")


def open_source(path: Path | str, base: TensorSource | None = None) -> StoredSource:
    """The tensors under `path`. (An adapter has none of its own: see `delta.virtual.adapted`.)

    Args:
        path: A safetensors file or a folder of them, a torch `.bin` file or folder, or a DeepSpeed ZeRO
            checkpoint (tag folder, or save folder with `latest`).
        base: The model that it was tuned from, whose names its tensors then get.

    Raises:
        InputError: There is nothing of the kind (saying what was looked for), or it is damaged or not
            supported.
    """
    path = Path(path)
    require_whole(path)
    if is_adapter(path):
        raise InputError(f"{path}: an adapter; the model that it was trained on must be given with it")
    source = _open_stored(path)
    if not source.tensors:
        raise InputError(f"{path}: holds no tensors")
    if base is not None:
        _require_no_lora_names(path, source.tensors, base)
        source.rename(align_to_base([*source.tensors, *source.aliases], base))
    return source


def require_whole(path: Path) -> None:
    """Raises InputError if there is nothing at `path`, or if it is still being written."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder{_hub_advice(path)}")
    if (path / INCOMPLETE).exists():
        raise InputError(f"{path}: is not whole, the run that was writing it did not finish; run it again")


def _open_stored(path: Path) -> StoredSource:
    """Where a folder holds several kinds, the most exact one.

    Transformers' Trainer writes 16-bit safetensors beside a ZeRO checkpoint.
    """
    # ZeRO first: its masters are float32, what lies beside them is rounded.
    if is_zero_folder(path):
        return ZeroSource(path)
    if path.suffix == ".safetensors" or any(path.glob("*.safetensors*")):
        return SafetensorsSource(path)
    if path.suffix in _TORCH_TYPES or any(path.glob("pytorch_model*.bin*")):
        return TorchBinSource(path)
    saves = (
        [str(child) for child in sorted(path.iterdir()) if child.is_dir() and is_zero_folder(child)]
        if path.is_dir()
        else []
    )
    if saves:
        raise InputError(
            f"{path}: has no file `latest` that names one of its checkpoints; give the one that you mean:"
            f" {', '.join(saves)}"
        )
    looked_for = (
        "*.safetensors, pytorch_model*.bin, adapter_config.json, *_optim_states.pt or latest (DeepSpeed)"
    )
    raise InputError(f"{path}: no weights found; looked for {looked_for}")


def _hub_advice(path: Path) -> str:
    """What to do about an absent path that may be meant for a model on the hub: `gpt2`, `org/name`."""
    is_place = str(path.parent) != "." and path.parent.is_dir()
    if not _HUB_ID.fullmatch(str(path)) or path.suffix in (".safetensors", *_TORCH_TYPES) or is_place:
        return ""
    return (
        "; weights are read from a local folder:"
        f" `hf download {path} --local-dir FOLDER` makes one of a model on the hub,"
        " `flearn models list` names small models that come without it"
    )


def _require_no_lora_names(path: Path, names: Iterable[str], base: TensorSource) -> None:
    """Raises InputError for the names of a LoRA run, unless the base has such names, too.

    The weights of such a run have not changed; its factors have.
    """
    example = next(filter(_OF_LORA.search, names), None)
    if example is None or any(map(_OF_LORA.search, base.tensors)):
        return
    folders = filter(is_adapter, path.absolute().parents[:2])
    where = next((str(folder) for folder in folders), "the one with adapter_config.json")
    what = f"holds an adapter or a checkpoint of a LoRA run ({example}), not a whole model"
    raise InputError(f"{path}: {what}; give the adapter's folder: {where}")
