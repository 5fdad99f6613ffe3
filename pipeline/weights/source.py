"""What a tensor source is: named tensors, read in flat slices, whatever they lie in.

A safetensors folder, a ZeRO checkpoint, and theta' itself (`pipeline/delta/virtual.py`) are all sources.
So writing one, verifying one, and loading one into a running engine are each written once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from pipeline.weights.floats import Array

Dtype = Literal[
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
]

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, shape and stored dtype (torch's name for it)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BYTES[self.dtype]

    @property
    def is_floating(self) -> bool:
        return "float" in self.dtype


class TensorSource(Protocol):
    """Named tensors that are read slice by slice; safe to read from several threads at once."""

    kind: str
    """What it lies in: `safetensors`, `zero-2`, `virtual`, ..."""

    tensors: dict[str, TensorInfo]
    """Every tensor once, under the Hugging Face hub's name, in the order it is best read in."""

    aliases: dict[str, str]
    """Names that are the same memory as another (tied weights): {alias: owner}. Not in `tensors`."""

    def read(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        """Elements [start, stop) of the tensor, flattened in C order. An alias reads its owner.

        Args:
            out: Where to put them: 1-D, contiguous, of the tensor's dtype and `stop - start` elements.

        Returns:
            `out`, or a new 1-D array: numpy's dtype of the stored one, and uint16 for bfloat16 (see
            `floats`).

        Raises:
            InputError: The bytes cannot be had, or a weight is not a finite number where that is looked at.
        """
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


def main_dtype(tensors: Iterable[TensorInfo]) -> str:
    """The floating-point dtype of most of the elements: what `config.json` calls the model's dtype."""
    count: dict[str, int] = {}
    for info in tensors:
        count[info.dtype] = count.get(info.dtype, 0) + (info.num_elements if info.is_floating else 0)
    return max(count, key=lambda dtype: count[dtype])
