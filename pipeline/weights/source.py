"""What a tensor source is: named tensors, read in flat slices, whatever they lie in.

A safetensors folder, a ZeRO checkpoint, an adapter on its base, and theta - lambda * (tuned - theta) itself
are all sources, so whatever is done with one (write it, verify it, load it into a running engine) is written
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

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
    """What it lies in: `safetensors`, `zero-2`, `adapter`, ..."""

    tensors: dict[str, TensorInfo]
    """Every tensor once, under the Hugging Face hub's name, in the order it is best read in."""

    aliases: dict[str, str]
    """Names that are the same memory as another (tied weights): {alias: owner}. Not in `tensors`."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the tensor, flattened in C order: a 1-D tensor of its stored dtype. An
        alias reads its owner.

        The result may share a buffer with the source's file and must not be written to.
        """
        ...

    def close(self) -> None:
        """Let go of files and mappings."""
        ...
