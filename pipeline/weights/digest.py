"""A digest of what a file or folder holds, wherever it lies: it decides whether a result is still right.

Weights are sampled, so that planning a 7B experiment reads megabytes, not gigabytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.weights.formats.safetensors import read_header
from pipeline.weights.io.pread import PreadFile

_MIB = 1 << 20
_SMALL_FILE_BYTES = 8 * _MIB
_PAGE_BYTES = 4096
_MIN_PAGES = 256
_RANGES_AT_ONCE = 64
_NUM_READERS = 16
"""Many, because a shared folder takes a millisecond to answer each."""


def content_digest(path: Path) -> str:
    """16 hex digits: of a file's bytes, or of a folder's files by their names in it, hidden ones left out.

    Files up to 8 MiB are read whole, and so are adapters' weights. Of larger ones: the size, the first MiB (a
    safetensors header, however long it is) and the last (where torch's files have every tensor's checksum),
    and the first 4 KiB of every tensor of safetensors and of every MiB. What changes elsewhere goes unseen.

    Raises InputError if a file cannot be read.
    """
    digest = hashlib.sha256()
    files = (
        [path]
        if path.is_file()
        else sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path))
    )
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        for name in files:
            with closing(PreadFile(name)) as file:
                digest.update(f"{'' if name == path else name.relative_to(path)}\0{file.size}\0".encode())
                # Adapters whole: they are small, and differ from each other in few of their bytes.
                if file.size <= _SMALL_FILE_BYTES or name.name.startswith("adapter_model."):
                    for offset in range(0, file.size, _MIB):
                        digest.update(file.read_bytes(offset, min(_MIB, file.size - offset)))
                else:
                    _sample(file, digest, readers)
    return digest.hexdigest()[:16]


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _sample(file: PreadFile, digest: Any, readers: Executor) -> None:
    ranges = sorted(set(_ranges(file)))

    def read(some: list[tuple[int, int]]) -> bytes:
        return b"".join(file.read_bytes(offset, num_bytes) for offset, num_bytes in some)

    for content in readers.map(
        read, [ranges[i : i + _RANGES_AT_ONCE] for i in range(0, len(ranges), _RANGES_AT_ONCE)]
    ):
        digest.update(content)


def _ranges(file: PreadFile) -> Iterator[tuple[int, int]]:
    """Where to look, and at how many bytes."""
    tensors = _tensors(file)
    # A safetensors header, however long it is, lies before the first tensor.
    yield 0, max(_MIB, min(tensors, default=0))
    # torch's zip has its directory, with a checksum of every tensor, at the end.
    yield file.size - _MIB, _MIB
    stride = min(_MIB, file.size // _MIN_PAGES)
    for offset in [*tensors, *range(0, file.size, stride)]:
        yield offset, min(_PAGE_BYTES, file.size - offset)


def _tensors(file: PreadFile) -> list[int]:
    """Where the tensors of a safetensors file begin; what is wrong with one is said by whoever reads it."""
    if file.path.suffix != ".safetensors":
        return []
    try:
        return [entry.offset for entry in read_header(file).entries]
    except InputError:
        return []
