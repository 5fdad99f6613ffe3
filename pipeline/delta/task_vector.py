"""Task vectors: what is subtracted from a base, read in slices and never whole.

A task vector is what a fine-tuning changed (Ilharco et al., "Editing models with task arithmetic", ICLR
2023): the difference of two models (`Difference`), or the product of an adapter's factors (`LowRank`).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.delta.arithmetic import Change
from pipeline.delta.low_rank import Product
from pipeline.delta.match import match, require_usable
from pipeline.errors import InputError
from pipeline.weights.floats import Array, widen
from pipeline.weights.formats.adapter import Adapter, Factors, is_adapter
from pipeline.weights.formats.open import open_source, require_whole
from pipeline.weights.io.direct import Io
from pipeline.weights.names import align_to_base
from pipeline.weights.slices import SliceReader, room_for
from pipeline.weights.source import DTYPE_BYTES, TensorInfo, TensorSource

if TYPE_CHECKING:
    import torch


class TaskVector(Protocol):
    """What is subtracted from a base; safe to read from several threads at once."""

    names: Collection[str]
    """The base's tensors that it changes; all others stay as they are."""

    notes: list[str]
    """What was decided that one would want to know: buffers ignored, ties."""

    def slice(self, name: str, start: int, stop: int) -> Change:
        """Elements [start, stop) of the change of the tensor `name`, one of `names`.

        Good until the thread's next slice. Raises InputError if the bytes cannot be had.
        """
        ...

    def thread_bytes(self, name: str, num_elements: int) -> int:
        """The most memory that a slice of so many elements takes in a thread."""
        ...

    def many_threads(self) -> AbstractContextManager[None]:
        """Held while several threads read at once."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


class Difference:
    """tuned - base, of two models that fit (see `match`)."""

    def __init__(self, base: TensorSource, tuned: TensorSource, io: Io = "buffered") -> None:
        """Raises InputError with everything that does not fit. Closing closes `tuned`, not `base`."""
        self._tuned = tuned
        self._matched, self.notes = match(base, tuned)
        self.names: Collection[str] = self._matched.keys()
        self._reader = SliceReader(tuned, io, may_use_cache=True)

    def slice(self, name: str, start: int, stop: int) -> Change:
        """As `TaskVector.slice`: reads the tuned model's elements."""
        return Tuned(self._reader.read(self._matched[name], start, stop))

    def thread_bytes(self, name: str, num_elements: int) -> int:
        return room_for(num_elements * DTYPE_BYTES[self._tuned.tensors[self._matched[name]].dtype])

    def many_threads(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self._reader.close()
        self._tuned.close()


@dataclass(frozen=True)
class Tuned:
    """A slice of a difference: the tuned model's values, as they are stored."""

    values: Array

    @property
    def read(self) -> Mapping[str, Array]:
        return {"tuned": self.values}

    def compute(self, block: slice, base: Array, out: Array) -> Array:
        return np.subtract(widen(self.values[block], out), base, out=out)


class LowRank:
    """An adapter's change: scaling * (B @ A) of each module that it adapts."""

    def __init__(self, base: TensorSource, folder: Path) -> None:
        """Raises InputError for what is not plain LoRA (by name), and for modules that do not fit the
        base.
        """
        require_whole(folder)
        require_usable(base)
        self.notes: list[str] = []
        self._adapter = Adapter(folder)
        self._products = _products(self._adapter, base)
        self.names: Collection[str] = self._products.keys()
        self._room_elements = max(product.room_elements for product in self._products.values())
        self._own = threading.local()

    def slice(self, name: str, start: int, stop: int) -> Change:
        """As `TaskVector.slice`: multiplies the factors."""
        return Known(self._products[name].read(start, stop, self._room()).numpy())

    def thread_bytes(self, name: str, num_elements: int) -> int:
        return 8 * self._room_elements + self._products[name].working_bytes(num_elements)

    def _room(self) -> torch.Tensor:
        """The thread's own, for all slices: of memory that is freed and taken again, malloc keeps much
        more.
        """
        import torch

        if not hasattr(self._own, "room"):
            self._own.room = torch.empty(self._room_elements, dtype=torch.float64)
        room: torch.Tensor = self._own.room
        return room

    @contextmanager
    def many_threads(self) -> Iterator[None]:
        """The products are torch's, whose own threads would multiply with those that read."""
        import torch

        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)

    def close(self) -> None:
        self._adapter.close()


@dataclass(frozen=True)
class Known:
    """A slice whose change is known. Nothing is noted of it: processors may differ in a product's last
    bits.
    """

    values: Array

    @property
    def read(self) -> Mapping[str, Array]:
        return {}

    def compute(self, block: slice, base: Array, out: Array) -> Array:
        return self.values[block]


def _products(adapter: Adapter, base: TensorSource) -> dict[str, Product]:
    """{name of a tensor of the base: what the adapter adds to it}."""
    weights = {module: f"{module}.weight" for module in adapter.modules}
    aligned = align_to_base(list(weights.values()), base)
    absent = [module for module, weight in weights.items() if aligned.get(weight) not in base.tensors]
    if absent:
        modules = ", ".join(absent)
        raise InputError(
            f"{adapter.folder}: changes modules whose weights the base lacks or ties to others: {modules}"
        )
    products = {}
    for module, factors in adapter.modules.items():
        name = aligned[weights[module]]
        products[name] = _product(adapter, module, factors, base.tensors[name])
    return products


def _product(adapter: Adapter, module: str, factors: Factors, target: TensorInfo) -> Product:
    shape = factors.b.shape[0], factors.a.shape[1]
    if target.shape not in (shape, shape[::-1]):
        raise InputError(
            f"{adapter.folder}: {module}: its change is {shape}, the base's {target.name} is {target.shape};"
            " is it another model's adapter?"
        )
    # GPT-2's Conv1D stores a weight as in x out. Only of a square one the shape does not tell.
    is_square = shape[0] == shape[1]
    is_transposed = adapter.config.fan_in_fan_out if is_square else target.shape != shape
    return Product(adapter.source, factors.a.name, factors.b.name, factors.scaling, is_transposed)


def open_vector(path: Path | str, base: TensorSource, io: Io = "buffered") -> TaskVector:
    """The task vector of what lies at `path`: an adapter on `base`, or a fine-tuned `base`.

    `io` says how a model's files are read. Raises InputError for what is nothing of the kind, or does not
    fit."""
    path = Path(path)
    if is_adapter(path):
        return LowRank(base, path)
    tuned = open_source(path, base)
    try:
        return Difference(base, tuned, io)
    except BaseException:
        tuned.close()
        raise
