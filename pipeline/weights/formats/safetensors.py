"""Safetensors as a tensor source: a file, or a folder of shards with or without an index, read by position.

The header is parsed and checked here, not by the safetensors package: a hostile or truncated file is an
InputError before any tensor is touched. Format: 8 bytes of header length (little endian), a JSON object
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes without holes.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError
from pipeline.weights.formats.layout import find_weight_files
from pipeline.weights.io.pread import PreadFile
from pipeline.weights.source import DTYPE_BYTES, TensorInfo
from pipeline.weights.stored import Piece, StoredSource, StoredTensor

SINGLE = "model.safetensors"
INDEX = SINGLE + ".index.json"
DTYPE_OF_TAG = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
TAG_OF_DTYPE = {dtype: tag for tag, dtype in DTYPE_OF_TAG.items()}
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_DIMENSIONS = 64
"""torch's limit."""


class Entry(NamedTuple):
    """A tensor in one file, and the byte where it begins."""

    info: TensorInfo
    offset: int


class Header(NamedTuple):
    """What a safetensors file says it holds, in the order of its bytes."""

    entries: list[Entry]
    metadata: dict[str, str]


class SafetensorsSource(StoredSource):
    """The tensors of a safetensors file, or of a folder of them. Opening reads the headers alone."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        """Raises InputError for a damaged file, and for all shards and tensors that the index names but that
        are absent.
        """
        super().__init__(path)
        self._noted: dict[str, str] = {}
        files = find_weight_files(path, SINGLE, INDEX, "*.safetensors")
        for name in files.names:
            self._add_file(PreadFile(files.folder / name), files.weight_map)
        files.require(self.tensors)
        for alias, owner in self._noted.items():
            if alias not in self.tensors and owner in self.tensors:
                self.tie(alias, owner)

    def _add_file(self, file: PreadFile, weight_map: dict[str, str]) -> None:
        self._files.append(file)
        header = read_header(file)
        self._noted.update(header.metadata)  # safetensors' save_model notes there which name stands for which
        for info, offset in header.entries:
            if weight_map.get(info.name, file.path.name) != file.path.name:
                continue
            if info.name in self.tensors:
                other = self._stored[info.name].pieces[0].file.path.name
                raise InputError(
                    f"{file.path}: holds {info.name!r}, which {other} holds too; remove one of the files"
                )
            self.add(
                info.name, info.shape, StoredTensor(info.dtype, (Piece(file, offset, info.num_elements),))
            )


def read_header(file: PreadFile) -> Header:
    """The checked header: every tensor lies inside the file, none overlap, every byte belongs to one.

    Raises InputError, naming the file and the tensor.
    """
    if file.size < 8:
        raise InputError(f"{file.path}: {file.size} bytes are not a safetensors file; get it again")
    # The length is looked at before that many bytes are read: a hostile file claims exabytes.
    length = int.from_bytes(file.read_bytes(0, 8), "little")
    if length > min(MAX_HEADER_BYTES, file.size - 8):
        raise InputError(
            f"{file.path}: its header claims {length} bytes of a file of {file.size};"
            " it is truncated or not safetensors"
        )
    content = _parse(file.path, file.read_bytes(8, length))
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{file.path}: its __metadata__ is not a table of texts; the header is damaged")
    start = 8 + length
    spans = sorted(
        (_entry(file.path, name, value) for name, value in content.items()),
        key=lambda entry: (entry.offset, entry.info.num_bytes),
    )
    _require_contiguous(file, spans, file.size - start)
    return Header([Entry(entry.info, start + entry.offset) for entry in spans], metadata)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: its header is not valid JSON ({type(error).__name__});"
            " the file is damaged or not safetensors"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: its header is not a JSON object; the file is damaged or not safetensors")
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _entry(path: Path, name: str, value: Any) -> Entry:
    """One tensor's entry, its offset still relative to the end of the header."""
    try:
        tag, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise InputError(
            f"{path}: tensor {name!r} has no dtype, shape and data_offsets; the header is damaged"
        ) from None
    if not isinstance(tag, str) or tag not in DTYPE_OF_TAG:
        raise InputError(
            f"{path}: tensor {name!r} has the dtype {tag!r}; supported are {', '.join(DTYPE_OF_TAG)}"
        )
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(_is_count(size) for size in [*shape, begin, end])
    ):
        raise InputError(
            f"{path}: tensor {name!r} has sizes or offsets that are not natural numbers;"
            " the header is damaged"
        )
    num_bytes = prod(shape) * DTYPE_BYTES[DTYPE_OF_TAG[tag]]
    if end - begin != num_bytes:
        raise InputError(
            f"{path}: tensor {name!r} needs {num_bytes} bytes but its data_offsets span {end - begin};"
            " the header is damaged"
        )
    return Entry(TensorInfo(name, tuple(shape), DTYPE_OF_TAG[tag]), begin)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # True is an int, too


def _require_contiguous(file: PreadFile, entries: list[Entry], num_bytes: int) -> None:
    end = 0
    for entry in entries:
        if entry.offset != end:
            wrong = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            raise InputError(f"{file.path}: tensor {entry.info.name!r} {wrong}; the header is damaged")
        end += entry.info.num_bytes
    if end != num_bytes:
        wrong = (
            f"truncated: {end - num_bytes} bytes are missing"
            if end > num_bytes
            else f"damaged: {num_bytes - end} bytes belong to no tensor"
        )
        raise InputError(f"{file.path}: {wrong}; get it again")
