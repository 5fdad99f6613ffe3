from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.delta import disk
from pipeline.delta.disk import PAGE, InputFile, Io, OutputFile, SliceReader, page_memory, room_for
from pipeline.delta.floats import of_tensor
from pipeline.delta.page_cache import is_cached, tells_its_pages
from pipeline.errors import InputError
from pipeline.weights.pread import PreadFile
from pipeline.weights.stored import Piece, StoredSource, StoredTensor


class Scattered(StoredSource):
    """One tensor that lies in pieces over two files, as a ZeRO partition does."""

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


def require_direct(folder: Path) -> None:
    try:
        (folder / "probe").write_bytes(b"x" * PAGE)
        os.close(os.open(folder / "probe", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no direct I/O here")


@pytest.fixture(params=["direct", "buffered", "auto"])
def io(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "direct":
        require_direct(tmp_path)
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [[200_000], [100_000, 99_999, 70_001, 3], [5, 1, 90_000]])
def test_slices_are_read_from_wherever_they_lie(
    tmp_path: Path, io: Io, lengths: list[int], dtype: str
) -> None:
    source = Scattered(tmp_path, lengths, [1000, 4096, 12, 8200][: len(lengths)], dtype)
    reader = SliceReader(source, io, may_use_cache=True)
    total = sum(lengths)
    for start, stop in [(0, total), (1, total - 1), (total // 2, total // 2 + 1), (total - 40_000, total)]:
        num_bytes = (stop - start) * source.values.element_size()
        read = reader.read("w", start, stop, page_memory(room_for(num_bytes)))
        assert np.array_equal(read, of_tensor(source.values[start:stop]))
    reader.close()


def test_pieces_at_odd_bytes_are_read_through_the_page_cache(tmp_path: Path, io: Io) -> None:
    source = Scattered(tmp_path, [100_000], [1001])
    read = SliceReader(source, io, may_use_cache=True).read("w", 0, 100_000, page_memory(room_for(400_000)))
    assert np.array_equal(read, source.values.numpy())
    assert read.flags.aligned


@pytest.mark.parametrize("most", [PAGE, 3 * PAGE, 5000])
def test_short_reads_are_gone_on_with(
    tmp_path: Path, io: Io, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Scattered(tmp_path, [100_000, 100_000], [10_000, 0])
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: whole(file, [views[0][:most]], offset))
    read = SliceReader(source, io, may_use_cache=True).read("w", 3, 190_000, page_memory(room_for(800_000)))
    assert np.array_equal(read, source.values[3:190_000].numpy())


def test_a_device_that_wants_larger_pages_is_read_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_direct(tmp_path)
    source = Scattered(tmp_path, [100_000], [0])
    reader = SliceReader(source, "direct", may_use_cache=True)
    whole = os.preadv
    direct: set[int] = set()

    def preadv(file: int, views: list[memoryview], offset: int) -> int:
        if os.get_blocking(file) and "0.bin" in os.readlink(f"/proc/self/fd/{file}") and _is_direct(file):
            direct.add(file)
            raise OSError(errno.EINVAL, "no")
        return whole(file, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert np.array_equal(reader.read("w", 0, 100_000, page_memory(room_for(400_000))), source.values.numpy())
    assert direct


def _is_direct(file: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


def test_a_truncated_file_is_named(tmp_path: Path, io: Io) -> None:
    source = Scattered(tmp_path, [100_000], [0])
    os.truncate(tmp_path / "0.bin", 300_001)
    with pytest.raises(InputError, match=r"0\.bin.*truncated"):
        SliceReader(source, io, may_use_cache=True).read("w", 0, 100_000, page_memory(room_for(400_000)))


@pytest.mark.parametrize("num_bytes", [1, PAGE, 3 * PAGE + 17])
def test_an_output_has_its_bytes_and_no_more(tmp_path: Path, io: Io, num_bytes: int) -> None:
    memory = page_memory(4 * PAGE)
    memory[:] = bytes(i % 251 for i in range(4 * PAGE))
    with OutputFile(tmp_path / "x.safetensors", num_bytes, io) as output:
        for offset in range(0, num_bytes, PAGE):
            count = min(PAGE, num_bytes - offset)
            output.write_pages(memory[offset : offset + PAGE], count, offset)
        assert not (tmp_path / "x.safetensors").exists()
    assert (tmp_path / "x.safetensors").read_bytes() == bytes(memory[:num_bytes])
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_an_abandoned_output_leaves_nothing(tmp_path: Path, io: Io) -> None:
    with pytest.raises(KeyError), OutputFile(tmp_path / "x.safetensors", 100, io):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir() if path.name != "probe"] == []


def test_a_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"y" * 100)
    whole = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return whole(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(disk, "_LARGE_FILE_BYTES", 0)
    assert not InputFile(tmp_path / "x", "auto", True).is_direct
    with pytest.raises(InputError, match="--io buffered"):
        InputFile(tmp_path / "x", "direct", True)


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A file of 16 pages, all of them in the page cache; skipped where a page cannot be dropped from it."""
    require_direct(tmp_path)
    path = tmp_path / "x"
    path.write_bytes(os.urandom(16 * PAGE))
    drop(path)
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(PAGE)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            path.read_bytes()
            return path
    pytest.skip("this file system keeps its pages")


def drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def num_direct(path: Path, io: Io, monkeypatch: pytest.MonkeyPatch, may_use_cache: bool = True) -> int:
    """How many direct reads it takes to read pages 2 to 9, which are read rightly."""
    calls: list[int] = []
    whole = disk._read_direct

    def read(descriptor: int, view: memoryview, offset: int) -> int:
        calls.append(offset)
        return whole(descriptor, view, offset)

    with monkeypatch.context() as patches:
        patches.setattr(disk, "_LARGE_FILE_BYTES", 0)
        patches.setattr(disk, "_read_direct", read)
        file = InputFile(path, io, may_use_cache)
        memory = page_memory(8 * PAGE)
        file.read_pages(memory, 2 * PAGE, 8 * PAGE)
        file.close()
    assert bytes(memory) == path.read_bytes()[2 * PAGE : 10 * PAGE]
    return len(calls)


def test_what_lies_in_the_page_cache_is_taken_from_there(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert num_direct(cached, "auto", monkeypatch) == 0
    assert num_direct(cached, "direct", monkeypatch) == 1
    assert num_direct(cached, "auto", monkeypatch, may_use_cache=False) == 1


@pytest.mark.parametrize("pages", [range(0), range(2, 9), range(3, 10), range(2, 10, 2)])
def test_what_lies_there_only_in_part_is_not(
    cached: Path, monkeypatch: pytest.MonkeyPatch, pages: range
) -> None:
    drop(cached)
    with cached.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        for page in pages:
            os.pread(file.fileno(), PAGE, page * PAGE)
    assert num_direct(cached, "auto", monkeypatch) == 1


def test_asking_brings_nothing_into_the_cache(cached: Path) -> None:
    drop(cached)
    with cached.open("rb") as file:
        assert not is_cached(file.fileno(), 0, 16 * PAGE)
        assert not any(is_cached(file.fileno(), page * PAGE, PAGE) for page in range(16))
        assert not is_cached(file.fileno(), 16 * PAGE, PAGE)  # beyond the end


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_others_files_do_not_tell_their_pages(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(cached)
    with cached.open("rb") as file:
        assert tells_its_pages(cached, file.fileno())
        os.seteuid(65534)
        try:
            assert not tells_its_pages(cached, file.fileno())
        finally:
            os.seteuid(0)
    cached.read_bytes()
    monkeypatch.setattr(disk, "tells_its_pages", lambda path, descriptor: False)
    assert num_direct(cached, "auto", monkeypatch) == 1


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "ftruncate", "fsync", "replace"])
def test_a_failing_disk_names_the_file(
    tmp_path: Path, io: Io, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    monkeypatch.setattr(disk, "_LARGE_FILE_BYTES", 0)
    with pytest.raises(OSError) as caught, OutputFile(tmp_path / "x.safetensors", PAGE, io) as output:
        output.write_pages(page_memory(PAGE), PAGE, 0)
    assert caught.value.filename == str(tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("*.safetensors*"))
