"""Slices are read right from wherever they lie, by any way of reading, into each thread's own memory."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.weights import slices
from pipeline.weights.cast import Cast
from pipeline.weights.floats import Array, of_tensor
from pipeline.weights.io import direct
from pipeline.weights.io.direct import PAGE, Io
from pipeline.weights.io.pread import PreadFile
from pipeline.weights.slices import SliceReader
from pipeline.weights.stored import Piece, StoredSource, StoredTensor


class Scattered(StoredSource):
    """One tensor that lies in pieces over several files, as a ZeRO partition does."""

    kind = "scattered"

    def __init__(self, folder: Path, lengths: list[int], offsets: list[int], dtype: str = "float32") -> None:
        super().__init__(folder)
        generator = torch.Generator().manual_seed(0)
        self.values = torch.randn(sum(lengths), generator=generator).to(getattr(torch, dtype))
        pieces, done = [], 0
        for i, (length, offset) in enumerate(zip(lengths, offsets, strict=True)):
            path = folder / f"{i}.bin"
            part = self.values[done : done + length]
            path.write_bytes(b"x" * offset + part.view(torch.uint8).numpy().tobytes())
            pieces.append(Piece(PreadFile(path), offset, length))
            done += length
        self.add("w", (done,), StoredTensor(dtype, tuple(pieces)))

    def right(self, start: int, stop: int) -> Array:
        """What is to be read."""
        return of_tensor(self.values[start:stop])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [[200_000], [100_000, 99_999, 70_001, 3], [5, 1, 90_000]])
def test_slices_are_read_from_wherever_they_lie(
    tmp_path: Path, io: Io, lengths: list[int], dtype: str
) -> None:
    source = Scattered(tmp_path, lengths, [1000, 4096, 12, 8200][: len(lengths)], dtype)
    total = sum(lengths)
    with closing(SliceReader(source, io, may_use_cache=True)) as reader:
        for start, stop in [
            (0, total),
            (1, total - 1),
            (total // 2, total // 2 + 1),
            (total - 40_000, total),
        ]:
            assert np.array_equal(reader.read("w", start, stop), source.right(start, stop))


@given(
    pieces=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3 * PAGE)), min_size=1, max_size=9),
    data=st.data(),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("needs_direct")
def test_there_is_room_for_any_pieces(
    tmp_path: Path, pieces: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Whole pages are read around each: the room must hold them, and bytes must end up side by side."""
    source = Scattered(tmp_path, [length for length, _ in pieces], [offset for _, offset in pieces])
    total = source.values.numel()
    bounds = data.draw(st.lists(st.integers(0, total), max_size=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "_SMALL_EXTENT_BYTES", data.draw(st.sampled_from([PAGE, 3 * PAGE])))
        for start, stop in pairwise([0, *sorted(bounds), total]):
            if start < stop:  # memory of each slice's own size
                with closing(SliceReader(source, "direct", may_use_cache=True)) as reader:
                    assert np.array_equal(reader.read("w", start, stop), source.right(start, stop))


def test_pieces_at_odd_bytes_are_read_through_the_page_cache(tmp_path: Path, io: Io) -> None:
    source = Scattered(tmp_path, [100_000], [1001])
    with closing(SliceReader(source, io, may_use_cache=True)) as reader:
        read = reader.read("w", 0, 100_000)
        assert np.array_equal(read, source.right(0, 100_000))
        assert read.flags.aligned


@pytest.mark.parametrize("most", [PAGE, 3 * PAGE, 5000])
def test_short_reads_are_gone_on_with(
    tmp_path: Path, io: Io, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Scattered(tmp_path, [100_000, 100_000], [10_000, 0])
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: whole(file, [views[0][:most]], offset))
    with closing(SliceReader(source, io, may_use_cache=True)) as reader:
        assert np.array_equal(reader.read("w", 3, 190_000), source.right(3, 190_000))


@pytest.mark.usefixtures("needs_direct")
def test_a_device_that_wants_larger_pages_is_read_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Scattered(tmp_path, [100_000], [0])
    whole = os.preadv
    refused: set[int] = set()

    def preadv(file: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            refused.add(file)
            raise OSError(errno.EINVAL, "no")
        return whole(file, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with closing(SliceReader(source, "direct", may_use_cache=True)) as reader:
        assert np.array_equal(reader.read("w", 0, 100_000), source.right(0, 100_000))
    assert refused


def test_a_truncated_file_is_named(tmp_path: Path, io: Io) -> None:
    source = Scattered(tmp_path, [100_000], [0])
    os.truncate(tmp_path / "0.bin", 300_001)
    with closing(SliceReader(source, io, may_use_cache=True)) as reader:
        with pytest.raises(InputError, match=r"0\.bin.*truncated"):
            reader.read("w", 0, 100_000)


@pytest.mark.parametrize("number", [0, 1])
def test_the_file_that_the_source_opened_is_read_whatever_its_path_now_leads_to(
    tmp_path: Path, io: Io, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save renames a new file over the old: headers were checked of the old, so its bytes must be read."""
    monkeypatch.setattr(direct, "_LARGE_FILE_BYTES", 0)
    source = Scattered(tmp_path, [100_000, 50_000], [64, 8192])
    path = tmp_path / f"{number}.bin"
    size = path.stat().st_size
    (tmp_path / "new").write_bytes(b"\1" * size)
    with closing(SliceReader(source, io, may_use_cache=True)) as reader:
        if number == 1:  # before the reader has met it; of the first it has a descriptor by now
            assert np.array_equal(reader.read("w", 0, 90_000), source.right(0, 90_000))
        os.replace(tmp_path / "new", path)
        assert path.read_bytes() == b"\1" * size
        assert np.array_equal(reader.read("w", 0, 150_000), source.right(0, 150_000))
    path.unlink()
    with closing(SliceReader(source, io, may_use_cache=True)) as reader:
        assert np.array_equal(reader.read("w", 0, 150_000), source.right(0, 150_000))


def test_each_thread_has_memory_of_its_own(tmp_path: Path, io: Io) -> None:
    source = Scattered(tmp_path, [100_000, 100_000], [1000, 4096])
    begun, go_on = threading.Event(), threading.Event()
    found: list[Array] = []

    def read_late() -> None:
        values = reader.read("w", 0, 100_000)
        begun.set()
        go_on.wait()
        found.append(values.copy())

    with closing(SliceReader(source, io, may_use_cache=True)) as reader:
        thread = threading.Thread(target=read_late)
        thread.start()
        begun.wait()
        others = reader.read("w", 100_000, 200_000)
        go_on.set()
        thread.join()
        assert np.array_equal(found[0], source.right(0, 100_000))
        assert np.array_equal(others, source.right(100_000, 200_000))


def test_an_alias_is_read_as_its_owner(tmp_path: Path, io: Io) -> None:
    source = Scattered(tmp_path, [100_000], [1000], "bfloat16")
    source.tie("tied", "w")
    with closing(SliceReader(source, io, may_use_cache=True)) as reader:
        assert np.array_equal(reader.read("tied", 7, 99_000), source.right(7, 99_000))


def test_what_is_computed_goes_into_the_threads_memory(tmp_path: Path, io: Io) -> None:
    stored = Scattered(tmp_path, [100_000], [1000])
    stored.tie("tied", "w")
    reader = SliceReader(Cast(stored, "bfloat16"), io, may_use_cache=True)
    for name in ("w", "tied"):
        read = reader.read(name, 5, 90_000)
        assert np.array_equal(read, of_tensor(stored.values[5:90_000].bfloat16()))
        assert np.shares_memory(read, np.frombuffer(reader._own.area, np.uint8))
