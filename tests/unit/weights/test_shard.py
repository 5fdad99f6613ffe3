"""Shards: sizes, which tensors go into which file, and which elements any bytes of a file belong to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError
from pipeline.weights.formats.safetensors import SafetensorsSource
from pipeline.weights.shard import Shard, aligned, index_of, parse_size, plan_shards
from pipeline.weights.source import DTYPE_BYTES, TensorInfo

infos = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(sorted(DTYPE_BYTES))),
    min_size=1,
    max_size=8,
).map(lambda rows: [TensorInfo(f"t{i}", tuple(shape), dtype) for i, (shape, dtype) in enumerate(rows)])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("256MiB", 256 << 20),
        ("1.5 kb", 1500),
        ("7", 7),
        (9, 9),
        ("1TiB", 1 << 40),
        (" 3 B ", 3),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2 XB", "1e9", "0.1B", "2GB2"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="2GB"):
        parse_size(text)


@given(infos, st.integers(1, 400))
@settings(deadline=None)
def test_shards_hold_every_tensor_once_within_the_size(tensors: list[TensorInfo], limit: int) -> None:
    shards = plan_shards(tensors, limit)
    planned = [info.name for shard in shards for info in shard.tensors]
    assert sorted(planned) == sorted(info.name for info in tensors)
    for shard in shards:
        assert len(shard.header) % 8 == 0
        assert len(shard.tensors) == 1 or sum(info.num_bytes for info in shard.tensors) <= limit
        sizes = [DTYPE_BYTES[info.dtype] for info in shard.tensors]
        assert sizes == sorted(sizes, reverse=True), "else an element could begin at an odd byte"
    if len(shards) == 1:
        assert shards[0].file_name == "model.safetensors"
    else:
        assert [shard.file_name for shard in shards] == [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    index = index_of(shards)
    assert index["metadata"]["total_size"] == sum(info.num_bytes for info in tensors)
    assert index["weight_map"].keys() == {info.name for info in tensors}


def saved(folder: Path, tensors: list[TensorInfo]) -> Shard:
    """A file of random bits that safetensors itself writes, and what we know of it without reading them."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for info in tensors:
        most = 2 if info.dtype == "bool" else 256  # any other byte is no boolean
        bits = torch.randint(0, most, (info.num_bytes,), dtype=torch.uint8, generator=generator)
        values[info.name] = bits.view(getattr(torch, info.dtype)).view(info.shape)
    path = folder / "x.safetensors"
    save_file(values, path, {"format": "pt"})
    source = SafetensorsSource(path)
    source.close()
    return Shard(path.name, tuple(source.tensors.values()))


@given(infos, st.lists(st.tuples(st.integers(0, 900), st.integers(1, 900)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_of_a_file_are_located(
    tmp_path: Path, tensors: list[TensorInfo], ranges: list[tuple[int, int]]
) -> None:
    """At whatever byte a range begins or ends, within an element, the header, or beyond the file."""
    shard = saved(tmp_path, tensors)
    content = (tmp_path / shard.file_name).read_bytes()
    values = load_file(tmp_path / shard.file_name)
    header = len(shard.header)
    assert shard.num_bytes == len(content) and json.loads(shard.header[8:]) == json.loads(content[8:header])
    for begin, length in [*ranges, (0, len(content)), (header, 1), (len(content) - 1, 1)]:
        first, last = begin, begin + length
        covered: list[int] = []
        for part in shard.locate(first, last):
            size = DTYPE_BYTES[part.tensor.dtype]
            elements = values[part.tensor.name].flatten()[part.start : part.stop]
            at, end = first + part.position, first + part.end
            assert content[at:end] == elements.view(torch.uint8).numpy().tobytes()
            assert part.start < part.stop and at + size > first and end - size < last, "no element too many"
            covered += range(max(at, first), min(end, last))
        assert covered == list(range(max(first, header), min(last, len(content)))), "each byte once, in order"


def test_a_file_is_known_by_its_size_and_header(tmp_path: Path) -> None:
    infos = [TensorInfo("a", (3,), "float32"), TensorInfo("empty", (0, 2), "float32")]
    shard = saved(tmp_path, infos)
    assert shard.header == (tmp_path / shard.file_name).read_bytes()[: len(shard.header)]
    assert shard.is_written(tmp_path)
    assert not Shard(shard.file_name, (TensorInfo("b", (3,), "float32"),)).is_written(tmp_path)
    assert not Shard("y.safetensors", shard.tensors).is_written(tmp_path)
    os.truncate(tmp_path / shard.file_name, shard.num_bytes - 1)
    assert not shard.is_written(tmp_path)


def test_tensors_of_one_width_keep_their_order() -> None:
    dtypes = ["int8", "float32", "bfloat16", "int32", "bool", "float64"]
    ordered = aligned(TensorInfo(dtype, (1,), dtype) for dtype in dtypes)
    assert [info.dtype for info in ordered] == ["float64", "float32", "int32", "bfloat16", "int8", "bool"]
