"""Open whatever a path holds as a tensor source."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import InputError
from pipeline.weights import adapter_config
from pipeline.weights.adapter import AdapterSource
from pipeline.weights.conversions import align_to_base
from pipeline.weights.safetensors import SafetensorsSource
from pipeline.weights.source import TensorSource
from pipeline.weights.stored import StoredSource
from pipeline.weights.torch_bin import TorchBinSource
from pipeline.weights.writer import INCOMPLETE
from pipeline.weights.zero import ZeroSource
from pipeline.weights.zero_files import is_zero_folder


def open_source(path: Path | str, base: TensorSource | None = None) -> TensorSource:
    """The tensors under `path`.

    Args:
        path: A safetensors file or a folder of them, a torch `.bin` file or folder, a DeepSpeed ZeRO checkpoint (tag folder, or
            save folder with `latest`), or a PEFT adapter's folder.
        base: The model that it is a change of: an adapter needs it, and other sources get its names for their tensors.

    Raises:
        InputError: There is nothing of the kind (saying what was looked for), or it is damaged or not supported.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if (path / INCOMPLETE).exists():
        raise InputError(f"{path}: is not whole, the run that was writing it did not finish; run it again")
    if (path / adapter_config.FILE_NAME).is_file():
        if base is None:
            raise InputError(f"{path}: an adapter; the model that it was trained on must be given with it")
        return AdapterSource(path, base)
    source = _open_stored(path)
    if not source.tensors:
        raise InputError(f"{path}: holds no tensors")
    if base is not None:
        source.rename(align_to_base([*source.tensors, *source.aliases], base))
    return source


def _open_stored(path: Path) -> StoredSource:
    """Where a folder holds several kinds (the Trainer writes 16-bit safetensors beside a ZeRO checkpoint), the most exact one."""
    if is_zero_folder(path):
        return ZeroSource(path)
    if path.suffix == ".safetensors" or any(path.glob("*.safetensors*")):
        return SafetensorsSource(path)
    if path.suffix in (".bin", ".pt", ".pth") or any(path.glob("pytorch_model*.bin*")):
        return TorchBinSource(path)
    looked_for = "*.safetensors, pytorch_model*.bin, adapter_config.json, *_optim_states.pt or latest (DeepSpeed)"
    raise InputError(f"{path}: no weights found; looked for {looked_for}")
