"""A staged file: whole under its name or not there at all, and never swept away under a living writer."""

from __future__ import annotations

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import full_disk_message
from pipeline.weights.io import direct
from pipeline.weights.io.direct import PAGE, Io, page_memory
from pipeline.weights.io.staged import StagedFile, sweep

NAME = "x.safetensors"


def filled(num_pages: int) -> memoryview:
    """Pages of bytes that tell where they are."""
    memory = page_memory(num_pages * PAGE)
    memory[:] = bytes(i % 251 for i in range(num_pages * PAGE))
    return memory


@pytest.mark.parametrize("num_bytes", [1, PAGE, 3 * PAGE + 17])
def test_a_file_has_its_bytes_and_no_more(tmp_path: Path, io: Io, num_bytes: int) -> None:
    memory = filled(4)
    with StagedFile(tmp_path / NAME, num_bytes, io) as staged:
        for offset in range(0, num_bytes, PAGE):
            count = min(PAGE, num_bytes - offset)
            staged.write_pages(memory[offset : offset + PAGE], count, offset)
        assert not (tmp_path / NAME).exists()
    assert (tmp_path / NAME).read_bytes() == bytes(memory[:num_bytes])
    assert os.listdir(tmp_path) == [NAME]
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o644


def test_a_file_of_that_name_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path, io: Io) -> None:
    (tmp_path / NAME).write_bytes(b"old")
    with StagedFile(tmp_path / NAME, PAGE, io) as staged:
        staged.write_pages(filled(1), PAGE, 0)
        assert (tmp_path / NAME).read_bytes() == b"old"
    assert (tmp_path / NAME).read_bytes() == bytes(filled(1))


def test_threads_write_one_file(tmp_path: Path, io: Io) -> None:
    memory = filled(128)

    def write(i: int) -> None:
        staged.write_pages(memory[i * PAGE : (i + 1) * PAGE], PAGE, i * PAGE)

    with StagedFile(tmp_path / NAME, 128 * PAGE, io) as staged, ThreadPoolExecutor(4) as pool:
        list(pool.map(write, reversed(range(128))))
    assert (tmp_path / NAME).read_bytes() == bytes(memory)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_what_failed_leaves_nothing(tmp_path: Path, io: Io, error: type[BaseException]) -> None:
    with pytest.raises(error), StagedFile(tmp_path / NAME, 100, io):
        raise error
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_met_before_anything_is_written(
    tmp_path: Path, io: Io, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space") as caught:
        StagedFile(tmp_path / NAME, 100, io)
    assert str(tmp_path / NAME) in (full_disk_message(caught.value) or "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "ftruncate", "fsync", "replace"])
def test_a_failing_disk_names_the_file(
    tmp_path: Path, io: Io, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    monkeypatch.setattr(direct, "_LARGE_FILE_BYTES", 0)
    with pytest.raises(OSError) as caught, StagedFile(tmp_path / NAME, PAGE, io) as staged:
        staged.write_pages(page_memory(PAGE), PAGE, 0)
    assert caught.value.filename == str(tmp_path / NAME)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("needs_direct")
@pytest.mark.parametrize("most", [0, PAGE, 2 * PAGE, 5000])
def test_what_a_device_does_not_take_directly_goes_through_the_page_cache(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`most`: bytes that it takes at a time; 0: it wants larger pages."""
    whole = os.pwrite
    asked: list[int] = []

    def pwrite(file: int, view: memoryview, offset: int) -> int:
        if file == staged._direct:
            asked.append(offset)
            if most == 0:
                raise OSError(errno.EINVAL, "no")
            return whole(staged._descriptor, view[:most], offset)
        return whole(file, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    memory = filled(4)
    with StagedFile(tmp_path / NAME, 3 * PAGE + 17, "direct") as staged:
        staged.write_pages(memory, 3 * PAGE + 17, 0)
    assert asked
    assert (tmp_path / NAME).read_bytes() == bytes(memory[: 3 * PAGE + 17])


def test_a_living_writers_file_is_not_swept_away(tmp_path: Path, io: Io) -> None:
    with StagedFile(tmp_path / NAME, PAGE, io) as staged:
        sweep(tmp_path)
        staged.write_pages(filled(1), PAGE, 0)
    assert (tmp_path / NAME).read_bytes() == bytes(filled(1))


def test_what_killed_writers_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f".{NAME}.abcd1234.tmp").write_bytes(b"half of it")
    others = [NAME, ".config.json.abcd1234.tmp", f".{NAME}.long-name.tmp", f"{NAME}.abcd1234.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"somebody's")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_where_there_are_no_locks_nothing_is_swept_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / f".{NAME}.abcd1234.tmp").write_bytes(b"half of it, or a living writer's")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == [f".{NAME}.abcd1234.tmp"]
    with StagedFile(tmp_path / "y.safetensors", PAGE, "buffered") as staged:
        staged.write_pages(filled(1), PAGE, 0)
    assert (tmp_path / "y.safetensors").read_bytes() == bytes(filled(1))


def test_a_file_swept_away_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its locking, another process may take it for a killed writer's."""
    whole = fcntl.flock
    swept: list[Path] = []

    def lock(descriptor: int, operation: int) -> None:
        if not swept:
            swept.extend(tmp_path.iterdir())
            swept[0].unlink()
        whole(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    with StagedFile(tmp_path / NAME, PAGE, "buffered") as staged:
        staged.write_pages(filled(1), PAGE, 0)
    assert len(swept) == 1 and os.listdir(tmp_path) == [NAME]
    assert (tmp_path / NAME).read_bytes() == bytes(filled(1))
