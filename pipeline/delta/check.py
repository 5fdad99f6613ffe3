"""A result's files against the digests that were noted when they were written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from blake3 import blake3

from pipeline.delta.chunks import CHUNK_BYTES
from pipeline.delta.disk import Io, SliceReader, page_memory, room_for
from pipeline.delta.extras import file_digest
from pipeline.delta.floats import count_not_finite
from pipeline.delta.plan import is_recomputed
from pipeline.errors import InputError
from pipeline.weights.layout import read_index
from pipeline.weights.safetensors import INDEX, SafetensorsSource
from pipeline.weights.source import DTYPE_BYTES, TensorInfo

Digests = Mapping[str, Mapping[str, str]]
"""{file: {tensor: blake3 of its bytes}}."""

_NUM_READERS = 4


def check_files(out: Path, shards: Digests, extras: Mapping[str, str]) -> Iterator[str]:
    """Files that do not belong, a config or tokenizer that is not as it was written, and an index that leads
    elsewhere.

    Args:
        extras: {file: blake3 of its bytes} of what was copied to go with the weights.
    """
    for path in sorted(out.glob("*.safetensors")):
        if path.name not in shards:
            yield f"{path.name}: is not in the manifest"
    for name, digest in extras.items():
        if not (out / name).is_file():
            yield f"{name}: is missing"
        elif file_digest(out / name) != digest:
            yield f"{name}: its bytes are not those that were written"
    if len(shards) == 1:
        return
    try:
        weight_map = read_index(out / INDEX)
    except OSError as error:
        yield f"{INDEX}: cannot be read ({type(error).__name__})"
        return
    except InputError as error:
        yield str(error)
        return
    right = {name: file for file, tensors in shards.items() for name in tensors}
    for name in sorted({name for name, _ in weight_map.items() ^ right.items()}):
        yield f"{INDEX}: says that {name} lies in {weight_map.get(name)}; it lies in {right.get(name)}"


def check_shards(out: Path, shards: Digests, io: Io, on_progress: Callable[[int], None]) -> dict[str, str]:
    """{tensor or file: what is wrong with it}. `on_progress` is called with the number of shards that have
    been read.
    """
    found: dict[str, str] = {}
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        results = pool.map(lambda shard: dict(_check_shard(out / shard[0], shard[1], io)), shards.items())
        for num_read, problems in enumerate(results, start=1):
            found |= problems
            on_progress(num_read)
    return found


def _check_shard(path: Path, digests: Mapping[str, str], io: Io) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        yield path.name, f"{path.name}: is missing"
        return
    try:
        source = SafetensorsSource(path)
    except InputError as error:
        yield path.name, str(error)
        return
    with closing(source):
        for name in sorted(digests.keys() ^ source.tensors.keys()):
            yield name, f"{name}: is {'missing from' if name in digests else 'a stranger in'} {path.name}"
        reader, area = SliceReader(source, io, may_use_cache=False), page_memory(room_for(CHUNK_BYTES))
        for name in digests.keys() & source.tensors.keys():
            yield from (
                (name, f"{name} in {path.name}: {wrong}")
                for wrong in _check_tensor(reader, source.tensors[name], digests[name], area)
            )
        reader.close()


def _check_tensor(reader: SliceReader, info: TensorInfo, right: str, area: memoryview) -> Iterator[str]:
    digest, num_not_finite = blake3(), 0
    num_at_once = CHUNK_BYTES // DTYPE_BYTES[info.dtype]
    for start in range(0, info.num_elements, num_at_once):
        values = reader.read(info.name, start, min(start + num_at_once, info.num_elements), area)
        digest.update(values.view(np.uint8).data)
        if info.is_floating and not is_recomputed(info):
            num_not_finite += count_not_finite(values)
    wrong = []
    if info.num_elements == 0:
        wrong.append("is empty")
    if num_not_finite:
        wrong.append(f"{num_not_finite} elements are NaN or infinite")
    if digest.hexdigest() != right:
        wrong.append("its bytes are not those that were written")
    if wrong:
        yield ", ".join(wrong)
