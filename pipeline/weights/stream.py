"""The stream: shards made chunk by chunk on a few threads, so that reading, computing and writing overlap.

A thread takes the next chunk, has the source fill it, writes it at its place in the file, waits until the
chunk before it is hashed, and hashes its own. Memory is bounded by the number of threads, for each owns its
buffers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
from blake3 import blake3

from pipeline.context import Progress
from pipeline.errors import InputError
from pipeline.weights.floats import array_dtype
from pipeline.weights.io.direct import page_memory
from pipeline.weights.journal import Receipt
from pipeline.weights.shard import Part, Shard
from pipeline.weights.source import TensorSource

CHUNK_BYTES = 4 << 20
"""A chunk of a file. The grid is the same whatever the memory and the threads, and so are the sums over
chunks.
"""

MAX_THREADS = 8
"""More than a small machine's processors: some wait for the disk while others compute."""


class Notes(Protocol):
    """What is noted of one tensor while it is written, besides the digest of its bytes."""

    def add(self, observed: Any) -> None:
        """Take what the source observed of the next elements; called in their order."""
        ...

    def finish(self) -> dict[str, Any]:
        """The tensor's entry in the receipt. Raises InputError if the shard must not be put into its
        place.
        """
        ...


class WritableSource(TensorSource, Protocol):
    """A tensor source as the writer needs it."""

    thread_bytes: int
    """The most memory that a thread takes while it reads a chunk's elements, besides the chunk itself."""

    def read_noting(self, name: str, start: int, stop: int, out: Any) -> Any:
        """Elements [start, stop), at most a chunk, to `out`, as `read`; returns what is to be noted of them.

        Of the first elements of a tensor it is good for ever, of others until the thread's next read.
        """
        ...

    def notes(self, name: str) -> Notes:
        """Where what is observed of the tensor `name` is to be added up."""
        ...

    def is_noted(self, noted: dict[str, Any]) -> bool:
        """Whether an entry of a receipt, read from the disk, has what `notes` puts there."""
        ...

    def many_threads(self) -> AbstractContextManager[None]:
        """Held while several threads read at once."""
        ...


class Output(Protocol):
    """Where a shard's bytes go."""

    def write_pages(self, view: memoryview, num_bytes: int, offset: int) -> None: ...
    def commit(self) -> None: ...
    def abandon(self) -> None: ...


class Chunk(NamedTuple):
    """Bytes [offset, offset + num_bytes) of a shard's file: some of its header, then parts of tensors."""

    number: int
    offset: int
    num_bytes: int
    is_last: bool
    header: bytes
    parts: list[Part]


def cut(shard: Shard) -> Iterator[Chunk]:
    """The chunks of a shard's file, in order.

    No element lies across two chunks: tensors begin at multiples of their element's size, and so does a
    chunk.
    """
    for number, offset in enumerate(range(0, shard.num_bytes, CHUNK_BYTES)):
        end = min(offset + CHUNK_BYTES, shard.num_bytes)
        is_last = end == shard.num_bytes
        yield Chunk(
            number, offset, end - offset, is_last, shard.header[offset:end], shard.locate(offset, end)
        )


class Making:
    """A shard in the making: its output, and what is known of its tensors so far.

    Chunks are noted in their order.
    """

    def __init__(self, shard: Shard, output: Output, source: WritableSource) -> None:
        self.shard = shard
        self.output = output
        self.turn = 0
        """Number of the chunk whose turn it is to be noted."""
        self._digests = {tensor.name: blake3() for tensor in shard.tensors}
        self._notes = {tensor.name: source.notes(tensor.name) for tensor in shard.tensors}

    def note(self, chunk: Chunk, memory: memoryview, observed: Sequence[Any]) -> None:
        """Hash the chunk's bytes, and hand on what was observed of its parts."""
        for part, seen in zip(chunk.parts, observed, strict=True):
            self._digests[part.tensor.name].update(memory[part.position : part.end])
            self._notes[part.tensor.name].add(seen)
        self.turn += 1

    def finish(self) -> Receipt:
        """Put the shard into its place. Raises InputError, before that, if its notes have an objection."""
        receipt = {
            name: {"blake3": digest.hexdigest(), **self._notes[name].finish()}
            for name, digest in self._digests.items()
        }
        self.output.commit()
        return receipt


class Stream:
    """Makes shards of one source; each ends as a committed output and a receipt."""

    def __init__(self, source: WritableSource, memory_bytes: int) -> None:
        """Raises InputError if `memory_bytes` is too little for one thread."""
        self._source = source
        per_thread = CHUNK_BYTES + source.thread_bytes
        self._num_threads = min(MAX_THREADS, memory_bytes // per_thread)
        if self._num_threads == 0:
            needed = f"{(per_thread >> 20) + 1}MiB"
            raise InputError(f"--memory: {memory_bytes} bytes are too few; these models need {needed}")
        # Guards the iterator of chunks, the turns, the count of bytes and the failure.
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
        progress: Progress,
    ) -> None:
        """Make `shards`.

        Args:
            open_output: Called for each shard, in order, when its first chunk is begun.
            on_whole: Called when a shard is committed, from any thread.
            progress: Moved on, in the caller's thread, by the bytes that are done.

        Raises whatever a thread raised first; shards not committed by then are abandoned.
        """
        jobs = self._jobs(shards, open_output)
        threads = [
            # Daemons: a second Ctrl-C must end the process though a thread waits for a slow disk.
            threading.Thread(target=self._work, args=(jobs, on_whole), daemon=True)
            for _ in range(self._num_threads)
        ]
        shown = 0
        progress.start(sum(shard.num_bytes for shard in shards))
        try:
            with self._source.many_threads():
                for thread in threads:
                    thread.start()
                for thread in threads:
                    is_alive = True
                    while is_alive:  # once more after its end: it may have moved on since
                        thread.join(0.1)
                        is_alive = thread.is_alive()
                        done = self._num_done  # read once: others raise it
                        progress.advance(done - shown)
                        shown = done
        except BaseException as error:  # the caller was interrupted, or asked to stop
            self._fail(error)
            for thread in threads:
                thread.join()
        if self._failure is not None:
            for making in self._open:
                making.output.abandon()
            raise self._failure

    def _jobs(
        self, shards: Sequence[Shard], open_output: Callable[[Shard], Output]
    ) -> Iterator[tuple[Making, Chunk]]:
        for shard in shards:
            making = Making(shard, open_output(shard), self._source)
            self._open.append(making)
            for chunk in cut(shard):
                yield making, chunk

    def _work(self, jobs: Iterator[tuple[Making, Chunk]], on_whole: Callable[[Shard, Receipt], None]) -> None:
        try:
            memory = page_memory(CHUNK_BYTES)
            while (job := self._next(jobs)) is not None:
                making, chunk = job
                observed = self._fill(chunk, memory)
                # Written before it is hashed: the disk works while this thread waits for its turn.
                making.output.write_pages(memory, chunk.num_bytes, chunk.offset)
                self._note(making, chunk, memory, observed)
                if chunk.is_last:  # noted last, so all others are written by now
                    receipt = making.finish()
                    self._open.remove(making)
                    on_whole(making.shard, receipt)
        except BaseException as error:
            self._fail(error)

    def _next(self, jobs: Iterator[tuple[Making, Chunk]]) -> tuple[Making, Chunk] | None:
        # Under the lock, so that files are opened one after another, each at its full size.
        with self._lock:
            return next(jobs, None) if self._failure is None else None

    def _fill(self, chunk: Chunk, memory: memoryview) -> list[Any]:
        """Bring the chunk's bytes into `memory`; returns what was observed of each part.

        The last part comes first. Only a chunk's first part can go on with a tensor, and what was observed of
        such elements must last until their turn to be noted comes.
        """
        assert all(part.start == 0 for part in chunk.parts[1:]), "only the first part goes on with a tensor"
        memory[: len(chunk.header)] = chunk.header
        observed = []
        for part in reversed(chunk.parts):
            num_elements, dtype = part.stop - part.start, array_dtype(part.tensor.dtype)
            out = np.frombuffer(memory, dtype, num_elements, part.position)
            observed.append(self._source.read_noting(part.tensor.name, part.start, part.stop, out))
        return observed[::-1]

    def _note(self, making: Making, chunk: Chunk, memory: memoryview, observed: list[Any]) -> None:
        """Wait for the chunk's turn, then note it: digests and sums depend on the order."""
        with self._moved:
            self._moved.wait_for(lambda: making.turn == chunk.number or self._failure is not None)
            if self._failure is not None:
                raise self._failure
        making.note(chunk, memory, observed)
        with self._moved:
            self._num_done += chunk.num_bytes
            self._moved.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._moved:
            self._failure = self._failure or error
            self._moved.notify_all()
