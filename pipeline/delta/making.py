"""A shard in the making: its output, and what is known of its tensors so far; in the end its receipt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import numpy as np
from blake3 import blake3

from pipeline.delta.chunks import Chunk, Part
from pipeline.delta.floats import Array
from pipeline.delta.survival import Survival
from pipeline.errors import InputError
from pipeline.weights.shard import Shard

Receipt = dict[str, Any]
"""Of a finished shard, for each of its tensors: blake3 of the bytes, the survival sums, and blake3 of the
inputs where these are noted.
"""


class Output(Protocol):
    """Where a shard's bytes go."""

    def write_pages(self, view: memoryview, num_bytes: int, offset: int) -> None: ...
    def commit(self) -> None: ...
    def abandon(self) -> None: ...


class Computed(NamedTuple):
    """What is to be noted of a part of a tensor, beside its bytes."""

    survival: Survival | None
    """None: nothing was subtracted."""
    inputs: Mapping[str, Array | blake3]
    """What was read as `base` and as `tuned`: the values or, where the tensor begins with this part, their
    digest. Nothing of an adapter: a digest of its whole file is in the recipe, and processors may differ in
    its product.
    """

    @classmethod
    def of(cls, part: Part, survival: Survival | None, read: Mapping[str, Array]) -> Computed:
        """A tensor's beginning need not wait for its turn to be hashed."""
        return cls(
            survival,
            read if part.start > 0 else {role: blake3(_bytes(values)) for role, values in read.items()},
        )


class Making:
    """A shard in the making. Chunks are noted in their order."""

    def __init__(self, shard: Shard, output: Output) -> None:
        self.shard = shard
        self.output = output
        self.turn = 0
        """Number of the chunk whose turn it is to be noted."""
        self._digests = {tensor.name: blake3() for tensor in shard.tensors}
        self._inputs: dict[str, dict[str, blake3]] = {tensor.name: {} for tensor in shard.tensors}
        self._survivals = {tensor.name: Survival() for tensor in shard.tensors}

    def note(self, chunk: Chunk, memory: memoryview, computed: Sequence[Computed]) -> None:
        for part, (survival, inputs) in zip(chunk.parts, computed, strict=True):
            name = part.tensor.name
            self._digests[name].update(memory[part.position : part.end])
            for role, read in inputs.items():
                if isinstance(read, blake3):
                    self._inputs[name][role] = read
                else:
                    self._inputs[name][role].update(_bytes(read))
            if survival is not None:
                self._survivals[name].add(survival)
        self.turn += 1

    def finish(self, approve: Callable[[Receipt], None]) -> Receipt:
        """Put the shard into its place. Raises what `approve` does, and InputError if a weight is not a
        finite number.
        """
        receipt = {
            name: {
                "blake3": digest.hexdigest(),
                "inputs": {role: read.hexdigest() for role, read in self._inputs[name].items()},
                "survival": asdict(self._survivals[name]),
            }
            for name, digest in self._digests.items()
        }
        approve(receipt)
        for name, survival in self._survivals.items():
            if not survival.is_finite:
                raise InputError(
                    f"{name}: NaN or infinity in the base, in the tuned model, or after rounding to the stored dtype"
                )
        self.output.commit()
        return receipt


def _bytes(values: Array) -> memoryview:
    return values.view(np.uint8).data
