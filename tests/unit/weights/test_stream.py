"""The grid of chunks that a shard is written by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delta_models import save
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.weights import stream
from pipeline.weights.cast import Cast
from pipeline.weights.formats.open import open_source
from pipeline.weights.shard import Shard, aligned
from pipeline.weights.source import DTYPE_BYTES, TensorInfo
from pipeline.weights.stream import Stream, cut

SHAPES = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.integers(0, 3 * stream.CHUNK_BYTES)),
    min_size=1,
    max_size=8,
)


@given(SHAPES)
@settings(deadline=None, max_examples=100)
def test_every_byte_of_the_file_is_in_one_chunk_and_no_element_in_two(tensors: list[tuple[str, int]]) -> None:
    infos = [TensorInfo(f"t{i}", (count,), dtype) for i, (dtype, count) in enumerate(tensors)]
    shard = Shard("x.safetensors", aligned(infos))
    position, done = 0, dict.fromkeys((info.name for info in infos), 0)
    offsets, offset = {}, len(shard.header)
    for info in shard.tensors:
        offsets[info.name] = offset
        offset += info.num_bytes
    header = b""
    for number, chunk in enumerate(cut(shard)):
        assert (chunk.number, chunk.offset) == (number, position)
        header += chunk.header
        end = len(chunk.header)
        for part in chunk.parts:
            size = DTYPE_BYTES[part.tensor.dtype]
            assert part.position == end and part.start == done[part.tensor.name] < part.stop
            assert chunk.offset + part.position == offsets[part.tensor.name] + part.start * size
            assert part.position % size == 0
            end, done[part.tensor.name] = part.end, part.stop
        assert end == chunk.num_bytes <= stream.CHUNK_BYTES
        position += chunk.num_bytes
        assert chunk.is_last == (position == shard.num_bytes)
    assert position == shard.num_bytes
    assert header == shard.header
    assert done == {info.name: info.num_elements for info in infos}


def test_memory_says_how_many_threads_there_are(tmp_path: Path) -> None:
    source = Cast(open_source(save(tmp_path, {"w": torch.ones(3)})), "float32")
    one = stream.CHUNK_BYTES + source.thread_bytes
    numbers = [Stream(source, memory)._num_threads for memory in (one, 2 * one - 1, 2 * one, 100 * one)]
    assert numbers == [1, 1, 2, stream.MAX_THREADS]
    with pytest.raises(InputError, match=rf"--memory: {one - 1} bytes are too few; .* need \d+MiB"):
        Stream(source, one - 1)
