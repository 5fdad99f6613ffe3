"""The stream: shards computed chunk by chunk on a few threads, so that reading, arithmetic and writing
overlap.

Each thread takes the next chunk, reads the base's and the tuned model's elements, computes, writes the chunk
at its place, waits until the chunk before it is hashed, and hashes its own. There are more threads than
processors, to keep the disk busy, but only as many compute at a time: more would push each other's numbers
out of the caches. A thread owns its buffers, so memory is bounded by the number of threads, and the memory
limit decides that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue

import numpy as np

from pipeline.delta import chunks
from pipeline.delta.arithmetic import BLOCK_ELEMENTS, Arithmetic, Formula
from pipeline.delta.chunks import Chunk, Part, cut
from pipeline.delta.disk import Io, SliceReader, page_memory, room_for
from pipeline.delta.floats import Array, array_dtype, count_not_finite, of_tensor
from pipeline.delta.making import Computed, Making, Output, Receipt
from pipeline.delta.plan import Item, Plan, is_subtracted
from pipeline.delta.survival import Survival
from pipeline.errors import InputError
from pipeline.weights.adapter import AdapterSource
from pipeline.weights.shard import Shard
from pipeline.weights.source import DTYPE_BYTES, TensorSource

MAX_THREADS = 8
_SCRATCH_BYTES = 36 * BLOCK_ELEMENTS
"""A thread's intermediate results; stochastic rounding to float16 takes the most, 35 bytes an element."""


class Stream:
    """Computes shards of a plan; each ends as a committed output and a receipt."""

    def __init__(
        self,
        plan: Plan,
        base: TensorSource,
        tuned: TensorSource,
        formula: Formula,
        memory_bytes: int,
        io: Io,
        approve: Callable[[Receipt], None] | None = None,
    ) -> None:
        """`approve` sees each shard's receipt before the shard is put into its place, and raises what there
        is against it.

        Inputs are noted for it, and wherever the result can be undone; for others the work is saved.
        Raises InputError if `memory_bytes` is too little for one thread.
        """
        self._plan = plan
        self._notes_inputs = approve is not None or plan.can_be_undone
        self._approve = approve or (lambda receipt: None)
        self._base, self._tuned = (SliceReader(source, io, may_use_cache=True) for source in (base, tuned))
        self._adapter = tuned if isinstance(tuned, AdapterSource) else None
        self._base_room, self._tuned_room = _rooms(plan, tuned)
        per_thread = chunks.CHUNK_BYTES + self._base_room + self._tuned_room + _SCRATCH_BYTES
        self._num_threads = min(MAX_THREADS, memory_bytes // per_thread)
        if self._num_threads == 0:
            raise InputError(
                f"--memory: {memory_bytes} bytes are too few; these models need {(per_thread >> 20) + 1}MiB"
            )
        self._idle: SimpleQueue[Arithmetic] = SimpleQueue()
        for _ in range(min(self._num_threads, len(os.sched_getaffinity(0)))):
            self._idle.put(Arithmetic(formula))
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)
        self._open: list[Making] = []
        self._num_done = 0
        self._failure: BaseException | None = None

    def run(
        self,
        shards: Sequence[Shard],
        open_output: Callable[[Shard], Output],
        on_whole: Callable[[Shard, Receipt], None],
        on_progress: Callable[[int], None],
    ) -> None:
        """Compute `shards`.

        Args:
            open_output: Called for each shard, in order, when its first chunk is begun.
            on_whole: Called when a shard is committed, from any thread.
            on_progress: Called in the caller's thread with the bytes done so far.

        Raises whatever a thread raised first; shards not committed by then are abandoned.
        """
        jobs = self._jobs(shards, open_output)
        threads = [
            threading.Thread(target=self._work, args=(jobs, on_whole), daemon=True)
            for _ in range(self._num_threads)
        ]
        try:
            with nullcontext() if self._adapter is None else _one_torch_thread():
                for thread in threads:
                    thread.start()
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.1)
                        on_progress(self._num_done)
            on_progress(self._num_done)  # what was done since, or before any thread was looked at
        except BaseException as error:  # the caller was interrupted
            self._fail(error)
            for thread in threads:
                thread.join()
        self._base.close()
        self._tuned.close()
        if self._failure is not None:
            for making in self._open:
                making.output.abandon()
            raise self._failure

    def _jobs(
        self, shards: Sequence[Shard], open_output: Callable[[Shard], Output]
    ) -> Iterator[tuple[Making, Chunk]]:
        for shard in shards:
            making = Making(shard, open_output(shard))
            self._open.append(making)
            for chunk in cut(shard):
                yield making, chunk

    def _work(self, jobs: Iterator[tuple[Making, Chunk]], on_whole: Callable[[Shard, Receipt], None]) -> None:
        try:
            memory, base, tuned = (
                page_memory(chunks.CHUNK_BYTES),
                page_memory(self._base_room),
                page_memory(self._tuned_room),
            )
            while (job := self._next(jobs)) is not None:
                making, chunk = job
                computed = self._compute(chunk, memory, base, tuned)
                making.output.write_pages(memory, chunk.num_bytes, chunk.offset)
                self._note(making, chunk, memory, computed)
                if chunk.is_last:
                    receipt = making.finish(self._approve)
                    self._open.remove(making)
                    on_whole(making.shard, receipt)
        except BaseException as error:
            self._fail(error)

    def _next(self, jobs: Iterator[tuple[Making, Chunk]]) -> tuple[Making, Chunk] | None:
        with self._lock:
            return next(jobs, None) if self._failure is None else None

    def _compute(
        self, chunk: Chunk, memory: memoryview, base: memoryview, tuned: memoryview
    ) -> list[Computed]:
        memory[: len(chunk.header)] = chunk.header
        # The last first: only a chunk's first part goes on with a tensor, and what was read for it has to
        # stay until its turn comes.
        computed = [self._compute_part(part, memory, base, tuned) for part in reversed(chunk.parts)]
        return computed[::-1]

    def _compute_part(self, part: Part, memory: memoryview, base: memoryview, tuned: memoryview) -> Computed:
        """Fill the part's place in `memory`. `base` and `tuned` are room to read into."""
        item = self._plan.items[part.tensor.name]
        inputs = {"base": self._base.read(item.base.name, part.start, part.stop, base)}
        if item.other is not None and self._adapter is None:
            inputs["tuned"] = self._tuned.read(item.other, part.start, part.stop, tuned)
        out = np.frombuffer(memory, array_dtype(part.tensor.dtype), part.stop - part.start, part.position)
        with self._arithmetic() as arithmetic:
            survival = self._subtract(arithmetic, item, part, out, **inputs)
        return Computed.of(part, survival, inputs if self._notes_inputs else {})

    def _subtract(
        self,
        arithmetic: Arithmetic,
        item: Item,
        part: Part,
        out: Array,
        base: Array,
        tuned: Array | None = None,
    ) -> Survival | None:
        """Compute the part into `out`; what survived, or None where nothing is subtracted."""
        if item.other is None:
            arithmetic.keep(item.info.name, part.start, base, out)
            if is_subtracted(item.info):
                _require_finite(item.info.name, base, out)
            return None
        if tuned is not None:
            return arithmetic.subtract(item.info.name, part.start, base, tuned, out, False)
        assert self._adapter is not None
        delta = of_tensor(self._adapter.delta(item.other, part.start, part.stop))
        return arithmetic.subtract(item.info.name, part.start, base, delta, out, True)

    @contextmanager
    def _arithmetic(self) -> Iterator[Arithmetic]:
        """One of the few; waits for one to be idle."""
        arithmetic = self._idle.get()
        try:
            yield arithmetic
        finally:
            self._idle.put(arithmetic)

    def _note(self, making: Making, chunk: Chunk, memory: memoryview, computed: list[Computed]) -> None:
        with self._moved:
            self._moved.wait_for(lambda: making.turn == chunk.number or self._failure is not None)
            if self._failure is not None:
                raise self._failure
        making.note(chunk, memory, computed)
        with self._moved:
            self._num_done += chunk.num_bytes
            self._moved.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._moved:
            self._failure = self._failure or error
            self._moved.notify_all()


def _rooms(plan: Plan, tuned: TensorSource) -> tuple[int, int]:
    """The bytes that one thread needs for a chunk's elements: of the base, and of the tuned model or the
    adapter's change.
    """
    base_room = tuned_room = 1
    for item in plan.items.values():
        num_elements = min(item.info.num_elements, chunks.CHUNK_BYTES // DTYPE_BYTES[item.info.dtype])
        base_room = max(base_room, room_for(num_elements * DTYPE_BYTES[item.base.dtype]))
        if item.other is None:
            continue
        if isinstance(tuned, AdapterSource):
            tuned_room = max(tuned_room, tuned.delta_bytes(item.other, num_elements))
        else:
            tuned_room = max(
                tuned_room, room_for(num_elements * DTYPE_BYTES[tuned.tensors[item.other].dtype])
            )
    return base_room, tuned_room


def _require_finite(name: str, values: Array, out: Array) -> None:
    if count_not_finite(values) or (out.dtype != values.dtype and count_not_finite(out)):
        raise InputError(f"{name}: NaN or infinity in the base, or after rounding to the stored dtype")


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """An adapter's products are torch's; the stream's own threads are enough, and would multiply with its."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
