"""Reading past the page cache: whole pages, what is cached taken from there, and refusals made good."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.weights.io import direct
from pipeline.weights.io.direct import PAGE, InputFile, Io, is_cached, page_memory, tells_its_pages
from pipeline.weights.io.pread import PreadFile


def test_a_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"y" * 100)
    file = PreadFile(tmp_path / "x")
    whole = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return whole(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(direct, "_LARGE_FILE_BYTES", 0)
    assert not InputFile(file, "auto", True).is_direct
    with pytest.raises(InputError, match=f"{tmp_path}: .*--io buffered"):
        InputFile(file, "direct", True)


def test_a_system_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a file cannot be opened once more by its descriptor."""
    (tmp_path / "x").write_bytes(b"y" * 100)
    file = PreadFile(tmp_path / "x")

    def absent(path: Any, flags: int, *rest: Any) -> int:
        raise OSError(errno.ENOENT, "no", str(path))

    monkeypatch.setattr(os, "open", absent)
    monkeypatch.setattr(direct, "_LARGE_FILE_BYTES", 0)
    with closing(InputFile(file, "auto", True)) as opened:
        assert not opened.is_direct
        memory = page_memory(PAGE)
        opened.read(memory[:90], 10)
    assert bytes(memory[:90]) == b"y" * 90


@pytest.mark.usefixtures("needs_direct")
def test_only_large_files_are_read_directly_unless_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"y" * PAGE)
    file = PreadFile(tmp_path / "x")
    ways: list[Io] = ["auto", "direct", "buffered"]
    assert [InputFile(file, way, True).is_direct for way in ways] == [False, True, False]
    monkeypatch.setattr(direct, "_LARGE_FILE_BYTES", PAGE)
    assert [InputFile(file, way, True).is_direct for way in ways] == [True, True, False]


@pytest.mark.usefixtures("needs_direct")
def test_closing_leaves_the_sources_file_open(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"y" * PAGE)
    file = PreadFile(tmp_path / "x")
    before = len(os.listdir("/proc/self/fd"))
    opened = InputFile(file, "direct", True)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    opened.close()
    opened.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert file.read_bytes(0, 3) == b"yyy"


@pytest.fixture
def cached(tmp_path: Path, needs_direct: None) -> Path:
    """A file of 16 pages, all of them in the page cache; skipped where a page cannot be dropped from it."""
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
    """Have the page cache forget a file."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def num_direct(path: Path, io: Io, monkeypatch: pytest.MonkeyPatch, may_use_cache: bool = True) -> int:
    """How many direct reads it takes to read pages 2 to 9, which are read rightly."""
    calls: list[int] = []
    whole = direct._read_direct

    def read(descriptor: int, view: memoryview, offset: int) -> int:
        calls.append(offset)
        return whole(descriptor, view, offset)

    with monkeypatch.context() as patches:
        patches.setattr(direct, "_LARGE_FILE_BYTES", 0)
        patches.setattr(direct, "_read_direct", read)
        memory = page_memory(8 * PAGE)
        with closing(InputFile(PreadFile(path), io, may_use_cache)) as file:
            file.read_pages(memory, 2 * PAGE, 8 * PAGE)
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
    monkeypatch.setattr(direct, "tells_its_pages", lambda path, descriptor: False)
    assert num_direct(cached, "auto", monkeypatch) == 1
