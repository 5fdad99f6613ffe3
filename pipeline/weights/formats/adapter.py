"""A PEFT LoRA adapter's factors: which modules it changes, by which two matrices, times which number.

Format: `adapter_config.json`, and `adapter_model.safetensors` (or `.bin`) with
`base_model.model.<module>.lora_A.weight` (rank x in) and `lora_B.weight` (out x rank). The change of a
module's weight is scaling * (B @ A), where scaling is alpha / rank, or alpha / sqrt(rank) for rank-stabilised
LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from pipeline.errors import InputError
from pipeline.weights.formats.adapter_config import FILE_NAME, MERGE, AdapterConfig
from pipeline.weights.formats.safetensors import SafetensorsSource
from pipeline.weights.formats.torch_bin import TorchBinSource
from pipeline.weights.source import TensorInfo
from pipeline.weights.stored import StoredSource

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


def is_adapter(path: Path) -> bool:
    """Whether `path` is an adapter's folder."""
    return (path / FILE_NAME).is_file()


@dataclass(frozen=True)
class Factors:
    """What an adapter holds for one module."""

    a: TensorInfo
    """rank x in."""
    b: TensorInfo
    """out x rank."""
    scaling: float


class Adapter:
    """An adapter's factors, left on the disk."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError for what is not plain LoRA (by name), and for factors that make no product."""
        self.folder = folder
        self.source = open_factors(folder)
        self.config = AdapterConfig.read(folder)
        self.modules = {
            module: self._factors(module, *names)
            for module, names in _modules(folder, self.source.tensors).items()
        }

    def _factors(self, module: str, a_name: str, b_name: str) -> Factors:
        a, b, rank = self.source.tensors[a_name], self.source.tensors[b_name], self.config.rank(module)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] != rank:
            raise InputError(
                f"{self.folder}: {module}: lora_A is {a.shape} and lora_B {b.shape},"
                f" which is not a product of rank {rank}"
            )
        return Factors(a, b, self.config.alpha(module) / (sqrt(rank) if self.config.use_rslora else rank))

    def close(self) -> None:
        """Let go of the files."""
        self.source.close()


def open_factors(folder: Path) -> StoredSource:
    """All tensors of an adapter's weights file, under their own names. Raises InputError if it is absent."""
    if (folder / "adapter_model.safetensors").is_file():
        return SafetensorsSource(folder / "adapter_model.safetensors")
    if (folder / "adapter_model.bin").is_file():
        return TorchBinSource(folder / "adapter_model.bin")
    raise InputError(
        f"{folder}: has an adapter_config.json but no adapter_model.safetensors; save the adapter again"
    )


def _modules(folder: Path, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{module: (name of its A, name of its B)}.

    Raises InputError for tensors that are neither, or that lack the other one.
    """
    found: dict[str, dict[str, str]] = {}
    foreign = []
    for name in names:
        match = _KEY.fullmatch(name)
        if match:
            found.setdefault(match["module"], {})[match["factor"]] = name
        else:
            foreign.append(name)
    if foreign:
        raise InputError(
            f"{folder}: holds tensors that are not LoRA factors of linear layers: {', '.join(foreign)};"
            f" {MERGE}"
        )
    single = [module for module, factors in found.items() if len(factors) != 2]
    if single or not found:
        raise InputError(
            f"{folder}: has only one of lora_A and lora_B for {', '.join(single) or 'every module'};"
            " save the adapter again"
        )
    return {module: (factors["A"], factors["B"]) for module, factors in found.items()}
