"""Safetensors files and folders: read in any slices, and refused in one line where damaged or hostile."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delta_models import tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.errors import InputError
from pipeline.weights.formats.open import open_source
from pipeline.weights.formats.safetensors import SafetensorsSource

TENSORS = {
    "half": torch.randn(7, 5).bfloat16(),
    "wide": torch.randn(3, 1, 4, dtype=torch.float64),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "ids": torch.arange(11),
    "mask": torch.tensor([[True, False, True]]),
}
several = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_tensor_is_what_was_saved(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    assert source.kind == "safetensors" and source.tensors.keys() == TENSORS.keys()
    for name, saved in TENSORS.items():
        values = tensor(source, name)
        assert source.tensors[name].shape == tuple(saved.shape) and values.dtype == saved.dtype
        assert torch.equal(values, saved.flatten())


def test_values_go_where_the_caller_wants_them(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    for name, info in source.tensors.items():
        right = source.read(name, 0, info.num_elements)
        room = np.zeros(info.num_elements + 2, right.dtype)
        out = room[1:-1]
        assert source.read(name, 0, info.num_elements, out) is out
        assert np.array_equal(room, np.concatenate([[0], right, [0]]))


@given(st.lists(st.integers(0, 35), max_size=6))
@several
def test_any_split_of_reads_gives_the_whole(tmp_path: Path, cuts: list[int]) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    source = SafetensorsSource(tmp_path / "a.safetensors")
    bounds = [0, *sorted(cuts), 35]
    parts = [tensor(source, "half", start, stop) for start, stop in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(parts), TENSORS["half"].flatten())


def test_location_is_where_the_bytes_lie(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    source = SafetensorsSource(tmp_path / "a.safetensors")
    [(file, offset, num_bytes)] = source.locate("ids", 2, 9)
    assert file.path.read_bytes()[offset : offset + num_bytes] == TENSORS["ids"][2:9].numpy().tobytes()


def test_threads_read_at_once(tmp_path: Path) -> None:
    big = torch.arange(1 << 16)
    save_file({"big": big}, tmp_path / "a.safetensors")
    source = SafetensorsSource(tmp_path / "a.safetensors")
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda i: tensor(source, "big", i * 256, (i + 1) * 256), range(256))
    assert torch.equal(torch.cat(list(parts)), big)


def save_shards(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_one_source(tmp_path: Path, with_index: bool) -> None:
    save_shards(tmp_path)
    if not with_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    source = open_source(tmp_path)
    assert list(source.tensors) == ["a", "b"] and torch.equal(tensor(source, "b", 1), torch.zeros(2))


def test_shards_may_be_links_out_of_the_folder(tmp_path: Path) -> None:
    """As in the hub's cache: snapshots link to ../../blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "abc")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/abc")
    assert torch.equal(tensor(open_source(tmp_path / "snapshot"), "a"), torch.ones(2))


@pytest.mark.parametrize("with_index", [True, False])
def test_all_missing_shards_are_named(tmp_path: Path, with_index: bool) -> None:
    save_shards(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    if not with_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors"):
        open_source(tmp_path)


def test_all_tensors_that_the_index_promises_in_vain_are_named(tmp_path: Path) -> None:
    save_shards(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {"c": "model-00001-of-00002.safetensors", "d": "model-00002-of-00002.safetensors"}
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"c \(.*d \("):
        open_source(tmp_path)


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "..", "", "sub/a.safetensors", 7, None])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, file: Any) -> None:
    save_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(InputError, match=r"index\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"weight_map": 3}', "[" * 100_000])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    save_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json"):
        open_source(tmp_path)


def test_two_files_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(InputError, match="'a'"):
        open_source(tmp_path)


BAD_HEADERS = {
    "not an object": ([1, 2], b""),
    "not JSON": (b"{hello", b""),
    "not UTF-8": (b"\xff\xfe{}", b""),
    "deep": (b"[" * 200_000, b""),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "no fields": ({"a": {}}, b""),
    "list": ({"a": [1]}, b""),
    "unknown dtype": ({"a": entry("F8_E4M3", [8])}, b"12345678"),
    "dtype a list": ({"a": entry(["F32"])}, b"12345678"),
    "shape a text": ({"a": entry(shape="2")}, b"12345678"),
    "negative shape": ({"a": entry(shape=[-2])}, b"12345678"),
    "two negatives": ({"a": entry(shape=[-2, -1])}, b"12345678"),
    "bool shape": ({"a": entry("U8", [True] * 8)}, b"12345678"),
    "float shape": ({"a": entry(shape=[2.0])}, b"12345678"),
    "2^60": ({"a": entry("U8", [1 << 60], [0, 1 << 60])}, b"12345678"),
    "2^64 wraps to 8": ({"a": entry("U8", [1 << 32, 1 << 32, 8], [0, 8])}, b"12345678"),
    "many dimensions": ({"a": entry("U8", [1] * 65, [0, 1])}, b"1"),
    "beyond the file": ({"a": entry(offsets=[8, 16])}, b"12345678"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, b"12345678"),
    "backwards": ({"a": entry(offsets=[8, 0])}, b"12345678"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, b"12345678"),
    "wrong size": ({"a": entry(offsets=[0, 4])}, b"1234"),
    "overlap": ({"a": entry(offsets=[0, 8]), "b": entry(offsets=[4, 12])}, b"123456789012"),
    "hole": ({"a": entry(offsets=[0, 8]), "b": entry(offsets=[12, 20])}, b"x" * 20),
    "trailing": ({"a": entry()}, b"123456789"),
    "truncated": ({"a": entry()}, b"1234567"),
    "name half a surrogate pair": (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "name of two lines": ({"a\nb": entry()}, b"12345678"),
    "name that colours the terminal": ({"\x1b[31ma": entry()}, b"12345678"),
    "alias of two lines": ({"__metadata__": {"b\nc": "a"}, "a": entry()}, b"12345678"),
    "metadata": ({"__metadata__": {"a": 3}, "a": entry()}, b"12345678"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_one_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "bad.safetensors", *BAD_HEADERS[name])
    with pytest.raises(InputError, match=r"bad\.safetensors") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [100, 1 << 60, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(InputError, match="header"):
        open_source(write(tmp_path / "bad.safetensors", b"{}", length=length))


@pytest.mark.parametrize("size", range(8))
def test_a_file_of_a_few_bytes_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(InputError):
        open_source(tmp_path / "bad.safetensors")


@given(st.data())
@several
def test_a_file_with_changed_bytes_reads_in_bounds_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "b.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        source = SafetensorsSource(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    for name, info in source.tensors.items():
        assert source.read(name, 0, info.num_elements).size == info.num_elements


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "a.safetensors")
    source = SafetensorsSource(tmp_path / "a.safetensors")
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(InputError, match="truncated"):
        source.read("a", 0, 1000)


def test_what_was_looked_for_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such"):
        open_source(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"safetensors.*adapter_config.*optim_states"):
        open_source(tmp_path)
