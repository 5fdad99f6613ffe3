from __future__ import annotations

import errno
import os
import tempfile
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
def test_slices_are_read_from_wherever_they_lie(tmp_path: Path, io: Io, lengths: list[int], dtype: str) -> None:
    source = Scattered(tmp_path, lengths, [1000, 4096, 12, 8200][: len(lengths)], dtype)
    reader = SliceReader(source, io)
    total = sum(lengths)
    for start, stop in [(0, total), (1, total - 1), (total // 2, total // 2 + 1), (total - 40_000, total)]:
        num_bytes = (stop - start) * source.values.element_size()
        read = reader.read("w", start, stop, page_memory(room_for(num_bytes)))
        assert np.array_equal(read, of_tensor(source.values[start:stop]))
    reader.close()


def test_pieces_at_odd_bytes_are_read_through_the_page_cache(tmp_path: Path, io: Io) -> None:
    source = Scattered(tmp_path, [100_000], [1001])
    read = SliceReader(source, io).read("w", 0, 100_000, page_memory(room_for(400_000)))
    assert np.array_equal(read, source.values.numpy())
    assert read.flags.aligned


@pytest.mark.parametrize("most", [PAGE, 3 * PAGE, 5000])
def test_short_reads_are_gone_on_with(tmp_path: Path, io: Io, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Scattered(tmp_path, [100_000, 100_000], [10_000, 0])
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: whole(file, [views[0][:most]], offset))
    read = SliceReader(source, io).read("w", 3, 190_000, page_memory(room_for(800_000)))
    assert np.array_equal(read, source.values[3:190_000].numpy())


def test_a_device_that_wants_larger_pages_is_read_through_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_direct(tmp_path)
    source = Scattered(tmp_path, [100_000], [0])
    reader = SliceReader(source, "direct")
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
        SliceReader(source, io).read("w", 0, 100_000, page_memory(room_for(400_000)))


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
    assert not InputFile(tmp_path / "x", "auto").is_direct
    with pytest.raises(InputError, match="--io buffered"):
        InputFile(tmp_path / "x", "direct")


def _drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _read_bytes_so_far() -> int:
    """What this process has had read from disks, in bytes (proc(5))."""
    return int(next(line.split()[1] for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes")))


def test_what_lies_in_the_page_cache_is_not_read_from_the_disk(tmp_path: Path) -> None:
    require_direct(tmp_path)
    path, num_bytes = tmp_path / "x", disk._LARGE_FILE_BYTES + PAGE
    path.write_bytes(os.urandom(1 << 20) * (num_bytes >> 20) + b"z" * PAGE)
    _drop_from_cache(path)
    right = path.read_bytes()[: 2 * PAGE]
    memory = page_memory(2 * PAGE)
    num_read: dict[Io, int] = {}
    modes: tuple[Io, ...] = ("auto", "direct")
    for io in modes:
        before = _read_bytes_so_far()
        file = InputFile(path, io)
        file.read_pages(memory, 0, 2 * PAGE)
        file.close()
        num_read[io] = _read_bytes_so_far() - before
        assert bytes(memory) == right
    assert num_read == {"auto": 0, "direct": 2 * PAGE}


def test_what_does_not_lie_there_is_not_brought_there(tmp_path: Path) -> None:
    require_direct(tmp_path)
    path = tmp_path / "x"
    path.write_bytes(b"z" * (disk._LARGE_FILE_BYTES + PAGE))
    _drop_from_cache(path)
    file = InputFile(path, "auto")
    file.read_pages(page_memory(2 * PAGE), 0, 2 * PAGE)
    file.close()
    with path.open("rb") as opened:
        if is_cached(opened.fileno(), 8 * PAGE, PAGE):
            pytest.skip("this file system keeps its pages")
        assert not is_cached(opened.fileno(), 0, 2 * PAGE)
        assert not is_cached(opened.fileno(), path.stat().st_size, PAGE)  # beyond the end


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_others_files_do_not_tell_their_pages() -> None:
    with tempfile.NamedTemporaryFile() as file:  # in a folder that others can enter
        os.chmod(file.name, 0o644)
        assert tells_its_pages(Path(file.name))
        os.seteuid(65534)
        try:
            assert not tells_its_pages(Path(file.name))
        finally:
            os.seteuid(0)
