"""A PEFT LoRA adapter on its base as a tensor source: base + scaling * (B @ A), block of rows by block of
rows.

Format: `adapter_config.json`, and `adapter_model.safetensors` (or `.bin`) with
    `base_model.model.<module>.lora_A.weight`
(rank x in) and `lora_B.weight` (out x rank).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import InputError
from pipeline.weights.adapter_config import MERGE, AdapterConfig
from pipeline.weights.conversions import align_to_base
from pipeline.weights.low_rank import LowRank
from pipeline.weights.safetensors import SafetensorsSource
from pipeline.weights.source import TensorInfo, TensorSource
from pipeline.weights.stored import StoredSource
from pipeline.weights.torch_bin import TorchBinSource

if TYPE_CHECKING:
    import torch

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


class AdapterSource:
    """The tensors of `base` with an adapter's change added: float32 where there is one, else as they are in
    the base.
    """

    kind = "adapter"

    def __init__(self, folder: Path, base: TensorSource) -> None:
        """Raises InputError for what is not plain LoRA (by name), and for modules that do not fit the base.
        Closing closes `base` too.
        """
        self._base = base
        self._factors = _open_factors(folder)
        self._changes = _changes(folder, self._factors, base)
        self.changed = frozenset(self._changes)
        self.tensors = {
            name: TensorInfo(name, info.shape, "float32") if name in self.changed else info
            for name, info in base.tensors.items()
        }
        self.aliases = dict(base.aliases)
        self._room_elements = max(change.room_elements for change in self._changes.values())
        self._own = threading.local()

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, the change added in float32."""
        name = self.aliases.get(name, name)
        values = self._base.read(name, start, stop)
        return values.float() + self.delta(name, start, stop) if name in self.changed else values

    def delta(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the change alone, float32. `name` must be one of `changed`."""
        return self._changes[name].read(start, stop, self._room())

    def delta_bytes(self, name: str, num_elements: int) -> int:
        """The most memory that `delta` takes in a thread for so many elements, its result included."""
        return 8 * self._room_elements + self._changes[name].working_bytes(num_elements)

    def _room(self) -> torch.Tensor:
        """The thread's own, for all slices: of memory that is freed and taken again, malloc keeps several
        times as much.
        """
        import torch

        if not hasattr(self._own, "room"):
            self._own.room = torch.empty(self._room_elements, dtype=torch.float64)
        room: torch.Tensor = self._own.room
        return room

    def close(self) -> None:
        self._factors.close()
        self._base.close()


def _open_factors(folder: Path) -> StoredSource:
    if (folder / "adapter_model.safetensors").is_file():
        return SafetensorsSource(folder / "adapter_model.safetensors")
    if (folder / "adapter_model.bin").is_file():
        return TorchBinSource(folder / "adapter_model.bin")
    raise InputError(
        f"{folder}: has an adapter_config.json but no adapter_model.safetensors; save the adapter again"
    )


def _changes(folder: Path, factors: TensorSource, base: TensorSource) -> dict[str, LowRank]:
    """{name of a tensor of the base: what is added to it}."""
    config = AdapterConfig.read(folder)
    modules = _modules(folder, factors.tensors)
    weights = {module: f"{module}.weight" for module in modules}
    aligned = align_to_base(list(weights.values()), base)
    absent = [module for module, weight in weights.items() if aligned.get(weight) not in base.tensors]
    if absent:
        raise InputError(
            f"{folder}: changes modules whose weights the base lacks or ties to others: {', '.join(absent)}"
        )
    return {
        aligned[weights[module]]: _change(
            folder, config, module, factors, pair, base.tensors[aligned[weights[module]]]
        )
        for module, pair in modules.items()
    }


def _modules(folder: Path, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{module: (name of its A, name of its B)}. Raises InputError for tensors that are neither, or that lack
    their fellow.
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
            f"{folder}: holds tensors that are not LoRA factors of linear layers: {', '.join(foreign)}; {MERGE}"
        )
    single = [module for module, factors in found.items() if len(factors) != 2]
    if single or not found:
        raise InputError(
            f"{folder}: has only one of lora_A and lora_B for {', '.join(single) or 'every module'}; save the adapter again"
        )
    return {module: (factors["A"], factors["B"]) for module, factors in found.items()}


def _change(
    folder: Path,
    config: AdapterConfig,
    module: str,
    factors: TensorSource,
    pair: tuple[str, str],
    target: TensorInfo,
) -> LowRank:
    a, b = (factors.tensors[name].shape for name in pair)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] != config.rank(module):
        raise InputError(
            f"{folder}: {module}: lora_A is {a} and lora_B {b}, which is not a product of rank {config.rank(module)}"
        )
    shape = b[0], a[1]
    if target.shape not in (shape, shape[::-1]):
        raise InputError(
            f"{folder}: {module}: its change is {shape}, the base's {target.name} is {target.shape}; is it another model's adapter?"
        )
    is_transposed = config.fan_in_fan_out if shape[0] == shape[1] else target.shape != shape
    rank = a[0]
    return LowRank(
        factors, *pair, config.alpha(module) / (sqrt(rank) if config.use_rslora else rank), is_transposed
    )
