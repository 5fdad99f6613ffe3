from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.delta import chunks
from pipeline.delta.chunks import cut
from pipeline.weights.shard import Shard, aligned
from pipeline.weights.source import DTYPE_BYTES, TensorInfo

SHAPES = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.integers(0, 3 * chunks.CHUNK_BYTES)),
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
            assert part.position == end and part.start == done[part.tensor.name] < part.stop
            assert (
                chunk.offset + part.position
                == offsets[part.tensor.name] + part.start * DTYPE_BYTES[part.tensor.dtype]
            )
            assert part.position % DTYPE_BYTES[part.tensor.dtype] == 0
            end, done[part.tensor.name] = part.end, part.stop
        assert end == chunk.num_bytes <= chunks.CHUNK_BYTES
        position += chunk.num_bytes
        assert chunk.is_last == (position == shard.num_bytes)
    assert position == shard.num_bytes
    assert header == shard.header
    assert done == {info.name: info.num_elements for info in infos}
