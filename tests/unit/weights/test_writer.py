"""Writing a source as a model folder: what from_pretrained loads, resumable, and never over somebody else's
weights.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError, full_disk_message
from pipeline.weights import writer
from pipeline.weights.aside import sweep
from pipeline.weights.open import open_source
from pipeline.weights.shard import Shard, ShardWriter, index_of, parse_size, plan_shards
from pipeline.weights.source import DTYPE_BYTES, TensorInfo, TensorSource
from pipeline.weights.writer import INCOMPLETE, write_model, write_shard

TENSORS = {
    "a": torch.randn(4, 3),
    "b": torch.randn(5).half(),
    "mask": torch.tensor([True, False, True]),
    "ids": torch.arange(6),
}

infos = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(sorted(DTYPE_BYTES))),
    min_size=1,
    max_size=8,
).map(lambda rows: [TensorInfo(f"t{i}", tuple(shape), dtype) for i, (shape, dtype) in enumerate(rows)])


@pytest.fixture
def source(tmp_path: Path) -> TensorSource:
    (tmp_path / "in").mkdir()
    save_file(TENSORS, tmp_path / "in" / "model.safetensors")
    return open_source(tmp_path / "in")


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
    assert sorted(info.name for shard in shards for info in shard.tensors) == sorted(
        info.name for info in tensors
    )
    for shard in shards:
        assert len(shard.header) % 8 == 0
        assert len(shard.tensors) == 1 or sum(info.num_bytes for info in shard.tensors) <= limit
    if len(shards) == 1:
        assert shards[0].file_name == "model.safetensors"
    else:
        assert [shard.file_name for shard in shards] == [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    index = index_of(shards)
    assert index["metadata"]["total_size"] == sum(info.num_bytes for info in tensors)
    assert index["weight_map"].keys() == {info.name for info in tensors}


@given(infos)
@settings(deadline=None, max_examples=25)
def test_safetensors_reads_a_written_file(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[TensorInfo]
) -> None:
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    values = {
        info.name: torch.randint(0, 2, (info.num_elements,)).to(getattr(torch, info.dtype))
        for info in tensors
    }
    with ShardWriter(path, tensors) as shard:
        for info in tensors:
            shard.write_slice(info.name, 0, values[info.name])
    read = load_file(path)
    assert read.keys() == values.keys()
    for info in tensors:
        assert tuple(read[info.name].shape) == info.shape and torch.equal(
            read[info.name].flatten(), values[info.name]
        )


def test_threads_write_one_file(tmp_path: Path) -> None:
    values = torch.randn(1 << 14)
    with (
        ShardWriter(tmp_path / "x.safetensors", [TensorInfo("a", (1 << 14,), "float32")]) as shard,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda i: shard.write_slice("a", i * 128, values[i * 128 : (i + 1) * 128]), range(128)))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], values)


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        ShardWriter(tmp_path / "x.safetensors", [TensorInfo("a", (4,), "float32")]),
    ):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_living_writers_file_is_not_swept_away(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.safetensors", [TensorInfo("a", (4,), "float32")]) as shard:
        sweep(tmp_path)
        shard.write_slice("a", 0, torch.ones(4))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(4))


def test_what_a_killed_writer_left_goes_with_the_next_shard(tmp_path: Path, source: TensorSource) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/.adapter_model.safetensors.abcd1234.tmp").write_bytes(b"half of it")
    write_shard(
        source, Shard("adapter_model.safetensors", tuple(source.tensors.values())), tmp_path / "adapter"
    )
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["adapter_model.safetensors"]


def test_a_hole_is_not_committed(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="never written"),
        ShardWriter(tmp_path / "x.safetensors", [TensorInfo("a", (4,), "float32")]) as shard,
    ):
        shard.write_slice("a", 0, torch.ones(3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["same", "float32", "bfloat16"])
def test_floats_are_cast_and_others_kept(source: TensorSource, tmp_path: Path, dtype: str) -> None:
    write_model(source, tmp_path / "out", dtype, "1GB", None)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in TENSORS.items():
        expected = (
            tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() and dtype != "same" else tensor
        )
        assert written[name].dtype == expected.dtype and torch.equal(written[name], expected)


def test_long_tensors_go_slice_by_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SLICE_ELEMENTS", 7)
    save_file({"a": torch.randn(10, 10), "b": torch.randn(7)}, tmp_path / "a.safetensors")
    write_model(open_source(tmp_path / "a.safetensors"), tmp_path / "out", "same", "1GB", None)
    written, original = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "a.safetensors"),
    )
    assert all(torch.equal(written[name], original[name]) for name in original)


class Failing:
    """A source that fails at one tensor, as a killed run would."""

    def __init__(self, source: TensorSource, name: str) -> None:
        self.kind, self.tensors, self.aliases, self.close = (
            source.kind,
            source.tensors,
            source.aliases,
            source.close,
        )
        self._source, self._name = source, name
        self.num_reads = 0

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.num_reads += 1
        if name == self._name:
            raise KeyboardInterrupt
        return self._source.read(name, start, stop)


def test_a_killed_run_goes_on_and_is_not_read_before(source: TensorSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_model(Failing(source, "mask"), out, "same", 30, None)
    kept = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
    assert kept and (out / INCOMPLETE).exists()
    with pytest.raises(InputError, match="not whole"):
        open_source(out)
    (out / ".model-00009-of-00009.safetensors.abcdefgh.tmp").write_bytes(b"what a killed writer left")
    write_model(source, out, "same", 30, None)
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert not list(out.glob(".*"))
    again = open_source(out)
    assert all(
        torch.equal(again.read(name, 0, tensor.numel()), tensor.flatten()) for name, tensor in TENSORS.items()
    )


def test_a_killed_run_of_another_shard_size_is_replaced(source: TensorSource, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_model(Failing(source, "ids"), tmp_path / "out", "same", 30, None)
    write_model(source, tmp_path / "out", "same", "1GB", None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_finished_model_is_not_written_again(source: TensorSource, tmp_path: Path) -> None:
    write_model(source, tmp_path / "out", "same", 30, None)
    unread = Failing(source, "none")
    write_model(unread, tmp_path / "out", "same", "1GB", None)
    assert unread.num_reads == 0


def test_other_weights_are_never_touched(source: TensorSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_file({"theirs": torch.ones(3)}, out / "model.safetensors")
    before = (out / "model.safetensors").read_bytes()
    for size in (30, "1GB"):
        with pytest.raises(InputError, match=r"model\.safetensors"):
            write_model(source, out, "same", size, None)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"] and (
        out / "model.safetensors"
    ).read_bytes() == before


def test_too_little_disk_is_said_before_anything_is_written(
    source: TensorSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"needed.*free"):
        write_model(source, tmp_path / "out", "same", "1GB", None)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_disk_that_fills_up_leaves_whole_shards_and_says_so(
    source: TensorSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, allocate, calls = tmp_path / "out", os.posix_fallocate, []

    def filling(descriptor: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, offset, size)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space") as caught:
        patch.setattr(os, "posix_fallocate", filling)
        write_model(source, out, "same", 30, None)
    assert "model-00002-of" in (full_disk_message(caught.value) or "")
    assert len(list(out.glob("*.safetensors"))) == 1 and not list(out.glob("*.tmp")) + list(
        out.glob(".*.tmp")
    )
    write_model(source, out, "same", 30, None)
    assert open_source(out).tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "config.json", "additional_chat_templates"])
def test_a_link_to_nothing_is_said_before_anything_is_written(
    source: TensorSource, tmp_path: Path, name: str
) -> None:
    (tmp_path / "in/vocab.bin").symlink_to("not copied, no matter")
    (tmp_path / "in" / name).symlink_to("../blobs/gone")
    with pytest.raises(InputError, match=rf"in/{name}: is a link to \.\./blobs/gone, which is not there"):
        write_model(source, tmp_path / "out", "same", "1GB", tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_config_and_tokenizer_come_along(source: TensorSource, tmp_path: Path) -> None:
    extras = tmp_path / "in"
    files = [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "spiece.model",
        "vocab.json",
        "merges.txt",
    ]
    for name in [*files, "README.md", "training_args.bin", "optimizer.pt", "manifest.json", "tokenizer.bin"]:
        (extras / name).write_text(name)
    (extras / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float16"}')
    write_model(source, tmp_path / "out", "bfloat16", "1GB", extras)
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*files, "config.json", "model.safetensors"])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
    }
    assert (tmp_path / "out" / "spiece.model").read_text() == "spiece.model"


def test_a_link_out_of_the_folder_is_refused_before_anything_is_written(
    source: TensorSource, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in/tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match=r"tokenizer\.json: is a link out of the model's folder"):
        write_model(source, tmp_path / "out", "bfloat16", "1GB", tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_transformers_loads_what_was_written(tiny_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for architecture in ("llama", "gpt2", "bloom"):
        folder, out = tiny_model(architecture), tmp_path / architecture
        write_model(open_source(folder), out, "float32", "40KB", folder)
        assert len(list(out.glob("*.safetensors"))) > 1
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder),
            AutoModelForCausalLM.from_pretrained(out),
        )
        assert all(
            torch.equal(x, y)
            for x, y in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
        )
        ids = AutoTokenizer.from_pretrained(out)("What is the capital?", return_tensors="pt")["input_ids"]
        assert torch.equal(before(ids).logits, after(ids).logits)
