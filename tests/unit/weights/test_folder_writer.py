"""Writing a source as a model folder: what from_pretrained loads, resumable, never over other weights."""

from __future__ import annotations

import errno
import json
import os
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from delta_models import load, save, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.context import Progress
from pipeline.errors import InputError, full_disk_message
from pipeline.weights import folder_writer, stream
from pipeline.weights.cast import Cast
from pipeline.weights.extras import render_extras
from pipeline.weights.floats import Array
from pipeline.weights.folder_writer import Content, Outcome, write_folder
from pipeline.weights.formats.open import open_source
from pipeline.weights.io.direct import PAGE, Io
from pipeline.weights.journal import INCOMPLETE
from pipeline.weights.shard import Shard, plan_shards
from pipeline.weights.source import DTYPE_BYTES, TensorSource

TENSORS = {
    "a": torch.randn(4, 3),
    "b": torch.randn(5).half(),
    "mask": torch.tensor([True, False, True]),
    "ids": torch.arange(6),
}
FLOATS = ["float64", "float32", "float16", "bfloat16"]
ALL = 10**9
"""A size that one shard is enough for."""
SMALL = 60
"""One that makes a shard of each but the smallest tensor."""


@pytest.fixture
def source(tmp_path: Path) -> TensorSource:
    return open_source(save(tmp_path / "in", TENSORS))


def write(
    source: TensorSource,
    out: Path,
    dtype: str = "float32",
    size: int = ALL,
    extras: Path | None = None,
    **options: Any,
) -> Outcome:
    """Write `source`, cast to `dtype`, in shards of `size` bytes, with the extras of a model's folder."""
    cast = Cast(source, dtype)
    content = Content(
        plan_shards(cast.tensors.values(), size),
        render_extras(extras, dtype),
        {"dtype": dtype, "max_shard_bytes": size},
    )
    return write_folder(cast, out, content, **options)


def one_thread(source: TensorSource, dtype: str = "float32") -> int:
    """Memory for one thread alone: shards are then made one after another."""
    return stream.CHUNK_BYTES + Cast(source, dtype).thread_bytes


def contents(folder: Path) -> dict[str, bytes]:
    """{path in `folder`: bytes} of all its files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def as_written(dtype: str) -> dict[str, torch.Tensor]:
    """The tensors as they are to be read from a folder of `dtype`."""
    kind = getattr(torch, dtype)
    return {name: saved.to(kind) if saved.is_floating_point() else saved for name, saved in TENSORS.items()}


def require_equal(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, values in right.items():
        assert found[name].dtype == values.dtype and torch.equal(found[name], values), name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [ALL, SMALL])
def test_floats_are_cast_and_others_kept(source: TensorSource, tmp_path: Path, dtype: str, size: int) -> None:
    outcome = write(source, tmp_path / "out", dtype, size)
    assert outcome.state == "written" and outcome.num_waiting == 0
    assert (len(outcome.manifest["shards"]) > 1) == (size == SMALL)
    require_equal(load(tmp_path / "out"), as_written(dtype))


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 70), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    target=st.sampled_from(FLOATS),
    size=st.integers(1, 40_000),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_safetensors_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, list[int]]], target: str, size: int
) -> None:
    folder = tmp_path_factory.mktemp("written")
    tensors, right = {}, {}
    for i, (dtype, shape) in enumerate(rows):
        values = torch.randint(0, 2, shape).to(getattr(torch, dtype))
        tensors[f"t{i}"] = values
        right[f"t{i}"] = values.to(getattr(torch, target)) if values.is_floating_point() else values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK_BYTES", PAGE)
        write(open_source(save(folder / "in", tensors)), folder / "out", target, size)
    require_equal(load(folder / "out"), right)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK_BYTES", 2 * PAGE)
        write(open_source(folder / "in"), folder / "again", target, size)
    assert contents(folder / "again") == contents(folder / "out")


def test_neither_threads_nor_chunks_nor_io_change_a_byte(
    tmp_path: Path, io: Io, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.randn(100, 99), "b": torch.randn(7), "c": torch.arange(30_000)}
    source = open_source(save(tmp_path / "in", tensors))
    write(source, tmp_path / "right", size=50_000)
    for chunk in (PAGE, 5 * PAGE):
        monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
        for memory in (one_thread(source), 256 << 20):
            out = tmp_path / f"{chunk}-{memory}"
            write(source, out, size=50_000, memory_bytes=memory, io=io)
            assert contents(out) == contents(tmp_path / "right")


def test_the_manifest_says_what_is_there(source: TensorSource, tmp_path: Path) -> None:
    (tmp_path / "in/config.json").write_text("{}")
    out = tmp_path / "out"
    outcome = write(source, out, "bfloat16", SMALL, tmp_path / "in")
    manifest, found = outcome.manifest, contents(out)
    assert manifest == json.loads(found["manifest.json"])
    assert manifest["recipe"] == {"dtype": "bfloat16", "max_shard_bytes": SMALL}
    assert manifest["dtype"] == "bfloat16"
    assert manifest["extras"] == {"config.json": blake3(found["config.json"]).hexdigest()}
    sizes = {name: len(content) for name, content in found.items() if name.endswith(".safetensors")}
    assert {shard["file"]: shard["num_bytes"] for shard in manifest["shards"]} == sizes
    assert manifest["num_bytes"] == sum(sizes.values())
    index = json.loads(found["model.safetensors.index.json"])
    for name, values in as_written("bfloat16").items():
        noted = manifest["tensors"][name]
        assert index["weight_map"][name] == noted["file"]
        assert torch.equal(load_file(out / noted["file"])[name], values)
        assert (noted["dtype"], noted["shape"]) == (str(values.dtype)[6:], list(values.shape))
        assert noted["blake3"] == blake3(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_a_source_may_describe_what_it_noted(source: TensorSource, tmp_path: Path) -> None:
    def describe(noted: Any, manifest: Any) -> dict[str, Any]:
        assert {name: entry["blake3"] for name, entry in noted.items()} == {
            name: entry["blake3"] for name, entry in manifest["tensors"].items()
        }
        return {"count": len(noted)}

    assert write(source, tmp_path / "out", size=SMALL, describe=describe).manifest["count"] == len(TENSORS)


def test_tied_names_are_not_written(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    save_file({"w": weight}, tmp_path / "in.safetensors", {"head": "w"})
    source = open_source(tmp_path / "in.safetensors")
    assert source.aliases == {"head": "w"}
    write(source, tmp_path / "out")
    require_equal(load(tmp_path / "out"), {"w": weight})


class Failing:
    """A source that fails at one tensor, as a killed run would."""

    def __init__(self, source: TensorSource, name: str) -> None:
        self.kind, self.tensors, self.aliases = source.kind, source.tensors, source.aliases
        self._source, self._name = source, name
        self.num_reads = 0

    def read(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        self.num_reads += 1
        if name == self._name:
            raise KeyboardInterrupt
        return self._source.read(name, start, stop, out)

    def close(self) -> None:
        self._source.close()


def begin(source: TensorSource, out: Path, name: str = "mask", size: int = SMALL) -> None:
    """Write up to the shard of a tensor, and be interrupted there."""
    with pytest.raises(KeyboardInterrupt):
        write(Failing(source, name), out, size=size, memory_bytes=one_thread(source))


def test_a_killed_run_goes_on_and_is_not_read_before(source: TensorSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(source, out)
    kept = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
    assert kept and (out / INCOMPLETE).exists()
    assert not list(out.glob(".*.tmp"))
    with pytest.raises(InputError, match="not whole"):
        open_source(out)
    (out / ".model-00009-of-00009.safetensors.abcdefgh.tmp").write_bytes(b"what a killed writer left")
    announced: list[Shard] = []
    write(source, out, size=SMALL, announce=announced.extend)
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert announced and not kept.keys() & {shard.file_name for shard in announced}
    assert not list(out.glob(".*"))
    again = open_source(out)
    for name, right in as_written("float32").items():
        assert torch.equal(tensor(again, name), right.flatten())


def test_a_shard_that_was_lost_or_cut_is_written_again(source: TensorSource, tmp_path: Path) -> None:
    write(source, tmp_path / "right", size=SMALL)
    out = tmp_path / "out"
    begin(source, out)
    first, second = sorted(out.glob("*.safetensors"))[:2]
    first.unlink()
    os.truncate(second, 100)
    write(source, out, size=SMALL)
    assert contents(out) == contents(tmp_path / "right")


def test_a_killed_run_of_another_recipe_is_refused(source: TensorSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(source, out)
    before = contents(out)
    with pytest.raises(InputError, match=rf"unfinished .*max_shard_bytes {SMALL} instead of {ALL}"):
        write(source, out)
    with pytest.raises(InputError, match=r"unfinished .*dtype float32 instead of bfloat16"):
        write(source, out, "bfloat16", SMALL)
    assert contents(out) == before


def test_a_finished_model_is_not_written_again(source: TensorSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = write(source, out, size=SMALL)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    unread = Failing(source, "none")
    assert write(unread, out, size=SMALL) == Outcome("found", first.manifest, 0)
    assert unread.num_reads == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(InputError, match="finished result of another recipe"):
        write(unread, out)


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json", "vocab.json"]
)
def test_a_finished_model_that_lost_a_file_is_refused(
    source: TensorSource, tmp_path: Path, name: str
) -> None:
    (tmp_path / "in/vocab.json").write_text("{}")
    write(source, tmp_path / "out", size=SMALL, extras=tmp_path / "in")
    (tmp_path / "out" / name).unlink()
    with pytest.raises(InputError, match=f"was finished, but {name} is missing"):
        write(source, tmp_path / "out", size=SMALL, extras=tmp_path / "in")


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt", ".hidden"])
def test_what_somebody_else_put_there_is_never_touched(
    source: TensorSource, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_file({"theirs": torch.ones(3)}, out / name)
    before = contents(out)
    for size in (SMALL, ALL):
        with pytest.raises(InputError, match=rf"{out}: is not empty \({name}\)"):
            write(source, out, size=size)
    assert contents(out) == before
    with pytest.raises(InputError, match="is not a folder"):
        write(source, out / name)
    assert contents(out) == before


def test_parts_make_one_folder(source: TensorSource, tmp_path: Path) -> None:
    write(source, tmp_path / "right", size=SMALL)
    out = tmp_path / "out"
    outcomes = [write(source, out, size=SMALL, part=(i, 3)) for i in (2, 0, 1)]
    assert [(outcome.state, outcome.num_waiting) for outcome in outcomes] == [
        ("waiting", 2),
        ("waiting", 1),
        ("written", 0),
    ]
    assert outcomes[0].manifest == {}
    assert contents(out) == contents(tmp_path / "right")


class Counting(Progress):
    """Adds up what it is told."""

    def __init__(self) -> None:
        super().__init__("", shown=False)
        self.total = self.done = 0

    def start(self, total: int) -> None:
        self.total += total

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount


def test_progress_moves_on_by_bytes(source: TensorSource, tmp_path: Path) -> None:
    progress = Counting()
    manifest = write(source, tmp_path / "out", size=SMALL, progress=progress).manifest
    assert progress.done == progress.total == manifest["num_bytes"]


def disk_of(num_bytes: int) -> Any:
    """A full disk's stand-in: so many bytes are free."""
    usage = namedtuple("usage", ["total", "used", "free"])
    return lambda path: usage(100 << 30, 0, num_bytes)


def test_too_little_disk_is_said_before_anything_is_written(
    source: TensorSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def announce(shards: Sequence[Shard]) -> None:
        raise AssertionError("the work was announced")

    monkeypatch.setattr(folder_writer, "disk_usage", disk_of(100))
    with pytest.raises(InputError, match=rf"{tmp_path}/out: .*needed.*100 bytes are free"):
        write(source, tmp_path / "out", announce=announce)
    assert not (tmp_path / "out").exists()


def test_what_is_written_by_now_needs_no_more_disk(
    source: TensorSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(source, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    shards = plan_shards(Cast(source, "float32").tensors.values(), SMALL)
    missing = sum(shard.num_bytes for shard in shards if shard.file_name not in written)
    monkeypatch.setattr(folder_writer, "disk_usage", disk_of(missing - 1))
    with pytest.raises(InputError, match=r"needed.*free"):
        write(source, tmp_path / "out", size=SMALL)
    monkeypatch.setattr(folder_writer, "disk_usage", disk_of(missing))
    assert write(source, tmp_path / "out", size=SMALL).state == "written"


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
        write(source, out, size=SMALL, memory_bytes=one_thread(source))
    assert "model-00002-of" in (full_disk_message(caught.value) or "")
    assert [path.name for path in out.glob("*.safetensors")] == ["model-00001-of-00003.safetensors"]
    assert not list(out.rglob("*.tmp"))
    write(source, out, size=SMALL)
    assert open_source(out).tensors.keys() == TENSORS.keys()


def test_too_little_memory_is_said_before_anything_is_written(source: TensorSource, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--memory"):
        write(source, tmp_path / "out", memory_bytes=one_thread(source) - 1)
    assert not (tmp_path / "out").exists()


def test_config_and_tokenizer_come_along(source: TensorSource, tmp_path: Path) -> None:
    extras = tmp_path / "in"
    (extras / "additional_chat_templates").mkdir()
    files = ["tokenizer.json", "spiece.model", "additional_chat_templates/short.jinja"]
    for name in files:
        (extras / name).write_text(f"content of {name}")
    (extras / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float16"}')
    write(source, tmp_path / "out", "bfloat16", extras=extras)
    found = contents(tmp_path / "out")
    assert found.keys() == {*files, "config.json", "model.safetensors", "manifest.json"}
    assert json.loads(found["config.json"]) == {"model_type": "llama", "torch_dtype": "bfloat16"}
    for name in files:
        assert found[name] == f"content of {name}".encode()


def test_transformers_loads_what_was_written(tiny_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for architecture in ("llama", "gpt2", "bloom"):
        folder, out = tiny_model(architecture), tmp_path / architecture
        write(open_source(folder), out, "float32", 40_000, folder)
        assert len(list(out.glob("*.safetensors"))) > 1
        before, after = (AutoModelForCausalLM.from_pretrained(one) for one in (folder, out))
        require_equal(dict(after.state_dict()), dict(before.state_dict()))
        ids = AutoTokenizer.from_pretrained(out)("What is the capital?", return_tensors="pt")["input_ids"]
        assert torch.equal(before(ids).logits, after(ids).logits)
