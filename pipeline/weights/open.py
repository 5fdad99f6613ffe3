"""Open whatever a path holds as a tensor source."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import InputError
from pipeline.weights.safetensors import SafetensorsSource
from pipeline.weights.source import TensorSource
from pipeline.weights.writer import INCOMPLETE


def open_source(path: Path | str, base: TensorSource | None = None) -> TensorSource:
    """The tensors under `path`: a safetensors file or folder.

    Raises InputError if there is nothing of the kind, saying what was looked for.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file() and path.suffix == ".safetensors":
        return SafetensorsSource(path)
    if (path / INCOMPLETE).exists():
        raise InputError(f"{path}: is not whole, the run that was writing it did not finish; run it again")
    if any(path.glob("*.safetensors")):
        return SafetensorsSource(path)
    raise InputError(f"{path}: no weights found; looked for *.safetensors")
