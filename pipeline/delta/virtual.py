"""Virtual models: theta' = base - scale * vector as a tensor source, computed where it is read.

It takes no memory and no disk: any slice of any tensor is computed from the base and the task vector, with
the same bytes however it is sliced. So a virtual model can be written, verified, or loaded into a running
engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from queue import LifoQueue
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from pipeline.delta import diagnostics
from pipeline.delta.arithmetic import BLOCK_ELEMENTS, Arithmetic, Formula, Rounding, is_scale
from pipeline.delta.match import is_subtracted
from pipeline.delta.survival import Survival
from pipeline.delta.task_vector import LowRank, TaskVector, open_vector
from pipeline.errors import InputError
from pipeline.weights import stream
from pipeline.weights.floats import Array, array_dtype, count_not_finite
from pipeline.weights.formats.open import open_source
from pipeline.weights.io.direct import Io
from pipeline.weights.journal import Kinds, has_fields
from pipeline.weights.slices import SliceReader, room_for
from pipeline.weights.source import DTYPE_BYTES, TensorInfo, TensorSource

_SCRATCH_BYTES = 36 * BLOCK_ELEMENTS
"""A thread's intermediate results; stochastic rounding to float16 takes the most, 35 bytes an element."""

_NUMBER = (int, float)
_NOTED: Kinds = {"survival": dict, "inputs": dict}
_SUMS: Kinds = {field.name: _NUMBER for field in fields(Survival)}


class Virtual:
    """theta' = base - scale * vector, with the base's tensors under the base's names: a `WritableSource`."""

    kind = "virtual"

    def __init__(
        self,
        base: TensorSource,
        vector: TaskVector,
        scale: float,
        dtype: str | Mapping[str, str] = "float32",
        rounding: Rounding = "nearest",
        seed: int = 0,
        io: Io = "buffered",
    ) -> None:
        """Closing closes `base` and `vector`, too.

        Args:
            scale: The paper's lambda.
            dtype: Of floating-point tensors: float32, bfloat16, float16, `same` (each as in the base), or one
                for each tensor by name (others as in the base).
            rounding: To 16 bits: to the nearest value, or stochastic, which keeps the mean.
            seed: Of stochastic rounding.
            io: How the base's files are read.

        Raises:
            InputError: The scale is not finite in float32.
        """
        require_scale(scale)
        self.base = base
        self.vector = vector
        self.formula = Formula(scale, rounding, seed)
        self.tensors = {name: _stored(info, dtype) for name, info in base.tensors.items()}
        self.aliases = dict(base.aliases)
        self._reader = SliceReader(base, io, may_use_cache=True)
        self.thread_bytes = _SCRATCH_BYTES + self._room_bytes()
        # Digests of what is read take time, and only `undo` wants them.
        self.notes_inputs = self.can_be_undone
        # Few compute at a time: more would push each other's numbers out of the processor's caches. Last in,
        # first out: what is still in the caches is taken first, and no more is touched than threads compute.
        self._idle: LifoQueue[Arithmetic] = LifoQueue()
        for _ in range(min(stream.MAX_THREADS, len(os.sched_getaffinity(0)))):
            self._idle.put(Arithmetic(self.formula))

    @property
    def can_be_undone(self) -> bool:
        """Whether nothing subtracted is rounded to 16 bits, so that the base can be had back from theta'."""
        return all(self.tensors[name].dtype in ("float32", "float64") for name in self.vector.names)

    def read(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        """Elements [start, stop) of theta', as they are stored.

        Raises InputError if a weight of the slice, read or computed, is NaN or infinite.
        """
        name = self.aliases.get(name, name)
        dtype = self.tensors[name].dtype
        out = np.empty(stop - start, array_dtype(dtype)) if out is None else out
        most = stream.CHUNK_BYTES // DTYPE_BYTES[dtype]  # what a thread has room for
        for begin in range(start, stop, most):
            end = min(begin + most, stop)
            self._compute(name, begin, out[begin - start : end - start], measured=False)
        return out

    def read_noting(self, name: str, start: int, stop: int, out: Array) -> Observed:
        """As `read`, of at most a chunk; returns what survives of the subtraction, and the inputs'
        digests.
        """
        survival, inputs = self._compute(name, start, out, measured=True)
        if not self.notes_inputs:
            return Observed(survival, {})
        # A tensor's beginning need not wait for its turn to be hashed.
        seen = inputs if start > 0 else {role: blake3(_bytes(values)) for role, values in inputs.items()}
        return Observed(survival, seen)

    def _compute(
        self, name: str, start: int, out: Array, measured: bool
    ) -> tuple[Survival | None, dict[str, Array]]:
        """Elements [start, start + len) of theta' to `out`; returns what survived, and what was read."""
        stop = start + out.size
        base = self._reader.read(name, start, stop)
        if name not in self.vector.names:
            with self._arithmetic() as arithmetic:
                arithmetic.keep(name, start, base, out)
            if is_subtracted(self.base.tensors[name]):
                _require_finite(name, base, out)
            return None, {"base": base}
        # Read before an arithmetic is taken: threads that wait for the disk must not keep others from
        # computing.
        change = self.vector.slice(name, start, stop)
        with self._arithmetic() as arithmetic:
            survival = arithmetic.subtract(name, start, base, change, out, measured)
        # Both lie in the thread's own memory, until it reads again.
        return survival, {"base": base, **change.read}

    @contextmanager
    def _arithmetic(self) -> Iterator[Arithmetic]:
        """One of the few; waits for one to be idle."""
        arithmetic = self._idle.get()
        try:
            yield arithmetic
        finally:
            self._idle.put(arithmetic)

    def notes(self, name: str) -> Notes:
        """Where a tensor's sums and digests are added up."""
        return Notes()

    def is_noted(self, noted: dict[str, Any]) -> bool:
        """Whether an entry of a receipt has what `Notes.finish` gives."""
        return has_fields(noted, _NOTED) and has_fields(noted["survival"], _SUMS)

    def warnings(self, survivals: Mapping[str, Survival], dtype: str) -> list[str]:
        """What whoever uses theta', stored mostly in `dtype`, should know of what survived."""
        return diagnostics.warnings(survivals, self.formula.scale, dtype)

    @contextmanager
    def many_threads(self) -> Iterator[None]:
        base = self.base.many_threads() if isinstance(self.base, Virtual) else nullcontext()
        with base, self.vector.many_threads():
            yield

    def close(self) -> None:
        self._reader.close()
        self.vector.close()
        self.base.close()

    def _room_bytes(self) -> int:
        """The most memory that one thread needs to read what a chunk is computed from."""
        most_base = most_vector = 1
        for name, info in self.tensors.items():
            num_elements = min(info.num_elements, stream.CHUNK_BYTES // DTYPE_BYTES[info.dtype])
            most_base = max(most_base, room_for(num_elements * DTYPE_BYTES[self.base.tensors[name].dtype]))
            if name in self.vector.names:
                most_vector = max(most_vector, self.vector.thread_bytes(name, num_elements))
        inner = self.base.thread_bytes if isinstance(self.base, Virtual) else 0
        return most_base + most_vector + inner


class Observed(NamedTuple):
    """What is to be noted of a slice, besides its bytes."""

    survival: Survival | None
    """None: nothing was subtracted."""
    inputs: Mapping[str, Array | blake3]
    """What was read as `base` and as `tuned`: the values or, where the tensor begins with them, their
    digest.
    """


class Notes:
    """What is noted of one tensor: how much of the subtraction survives, and digests of what it was made
    of.
    """

    def __init__(self) -> None:
        self._survival = Survival()
        self._inputs: dict[str, blake3] = {}

    def add(self, observed: Observed) -> None:
        """Take what was observed of the next elements."""
        for role, read in observed.inputs.items():
            if isinstance(read, blake3):
                self._inputs[role] = read
            else:
                self._inputs[role].update(_bytes(read))
        if observed.survival is not None:
            self._survival.add(observed.survival)

    def finish(self) -> dict[str, Any]:
        """The tensor's entry in the receipt."""
        digests = {role: digest.hexdigest() for role, digest in self._inputs.items()}
        return {"inputs": digests, "survival": asdict(self._survival)}


def require_scale(scale: float) -> None:
    """Raises InputError for a scale that float32, in which it is used, has not as a finite number."""
    if not is_scale(scale):
        raise InputError(f"scale {scale}: must be a finite number, in float32 too")


def _stored(info: TensorInfo, dtype: str | Mapping[str, str]) -> TensorInfo:
    """A tensor of the base as theta' has it."""
    wanted = dtype if isinstance(dtype, str) else dtype.get(info.name, "same")
    return info if wanted == "same" or not info.is_floating else replace(info, dtype=wanted)


def _require_finite(name: str, base: Array, out: Array) -> None:
    if count_not_finite(base) or (out.dtype != base.dtype and count_not_finite(out)):
        raise InputError(f"{name}: NaN or infinity in the base, or after rounding to the stored dtype")


def _bytes(values: Array) -> memoryview:
    return values.view(np.uint8).data


def open_virtual(
    base: Path | str,
    tuned: Path | str,
    scale: float,
    dtype: str | Mapping[str, str] = "float32",
    rounding: Rounding = "nearest",
    seed: int = 0,
    io: Io = "buffered",
) -> Virtual:
    """The virtual model of two paths (see `Virtual`).

    Raises InputError if they cannot be read, or do not fit.
    """
    require_scale(scale)  # before anything is read
    with ExitStack() as stack:
        opened = open_source(base)
        stack.callback(opened.close)
        vector = open_vector(tuned, opened, io)
        stack.callback(vector.close)
        virtual = Virtual(opened, vector, scale, dtype, rounding, seed, io)
        stack.pop_all()
        return virtual


def adapted(base: TensorSource, adapter: Path) -> Virtual:
    """`base` with an adapter's change added, in float32 where there is one.

    Raises InputError if they do not fit.
    """
    vector = LowRank(base, adapter)
    return Virtual(base, vector, -1.0, dict.fromkeys(vector.names, "float32"))
