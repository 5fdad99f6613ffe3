"""Virtual models: any slice, from any thread, is what `subtract` writes; and they load as files do."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delta_models import formula, layered, load, nudged, save, write_adapter
from zero_checkpoint import Checkpoint

from pipeline.delta.arithmetic import Arithmetic
from pipeline.delta.inspect import inspect
from pipeline.delta.subtract import subtract
from pipeline.delta.virtual import Virtual, adapted, open_virtual
from pipeline.errors import InputError
from pipeline.models.load import empty_model, fill
from pipeline.weights import stream
from pipeline.weights.floats import Array
from pipeline.weights.formats.open import open_source
from pipeline.weights.formats.safetensors import SafetensorsSource
from pipeline.weights.io.direct import PAGE

NUM_SLICES, NUM_THREADS = 500, 8
"""Of each kind of source and each rounding; shared by the threads."""

TUNED = ["safetensors", "zero-2", "zero-3", "adapter"]
ROUNDINGS: list[dict[str, Any]] = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "rounding": "stochastic", "seed": 5},
]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that slices are longer than what is computed at a time."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", PAGE)


def models(folder: Path, kind: str) -> tuple[Path, Path]:
    """(base, tuned) with a buffer, a weight that both have alike, and odd sizes."""
    base = layered(0) | {"steps": torch.arange(7)}
    tuned = nudged(layered(0), 1)
    save(folder / "base", base)
    if kind == "adapter":
        write_adapter(folder / "adapter")
        return folder / "base", folder / "adapter"
    if kind == "safetensors":
        return folder / "base", save(folder / "tuned", tuned | {"steps": torch.arange(7) + 1})
    names = list(tuned)
    groups = [{name: tuned[name] for name in part} for part in (names[:5], names[5:])]
    return folder / "base", Checkpoint(int(kind[-1]), 3, groups).write(folder / "checkpoints")


def slices(source: Virtual | SafetensorsSource, seed: int) -> list[tuple[str, int, int]]:
    """(tensor, start, stop), chosen at random; empty ones and whole tensors are among them."""
    chance = random.Random(seed)
    found = []
    for _ in range(NUM_SLICES // NUM_THREADS + 1):
        info = source.tensors[chance.choice(list(source.tensors))]
        start, stop = sorted(
            chance.choice([0, info.num_elements, chance.randint(0, info.num_elements)]) for _ in "ab"
        )
        found.append((info.name, start, stop))
    return found


def in_threads(work: Callable[[int], None]) -> None:
    """`work(i)` in thread i; raises what one of them raised."""
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("options", ROUNDINGS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("kind", TUNED)
def test_any_slice_from_any_thread_is_what_is_written(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    base, tuned = models(tmp_path, kind)
    subtract(base, tuned, 0.7, tmp_path / "out", **options)
    with (
        closing(open_virtual(base, tuned, 0.7, **options)) as virtual,
        closing(SafetensorsSource(tmp_path / "out")) as written,
    ):
        assert virtual.tensors == written.tensors

        def compare(thread: int) -> None:
            for name, start, stop in slices(virtual, thread):
                right = written.read(name, start, stop)
                assert np.array_equal(_bits(virtual.read(name, start, stop)), _bits(right)), (
                    name,
                    start,
                    stop,
                )
                out = np.empty_like(right)
                assert virtual.read(name, start, stop, out) is out
                assert np.array_equal(_bits(out), _bits(right)), (name, start, stop)

        in_threads(compare)


def _bits(values: Array) -> Array:
    return values.view(np.uint8)


@pytest.mark.parametrize("kind", TUNED)
def test_a_model_is_filled_without_a_file(tmp_path: Path, tiny_model: Callable[..., Path], kind: str) -> None:
    """For several scales one after another: nothing is written."""
    folder = tiny_model("gpt2" if kind == "safetensors" else "llama")
    base = load(folder)
    tuned = nudged(base, 1)
    if kind == "adapter":
        vector = tmp_path / "adapter"
        changes = write_adapter_for(folder, vector)
        tuned = {name: values + changes.get(name, 0) for name, values in base.items()}
    elif kind == "safetensors":
        vector = save(tmp_path / "tuned", tuned)
    else:
        vector = Checkpoint(int(kind[-1]), 3, [tuned]).write(tmp_path / "checkpoints")
    before = sorted(tmp_path.rglob("*"))
    for scale in (0.3, 0.7, -1.0):
        model = empty_model(folder, "cpu", torch.float32)
        with closing(open_virtual(folder, vector, scale)) as virtual:
            fill(model, virtual)
        right = formula(base, tuned, scale)
        found = model.state_dict()
        for name, values in right.items():
            mine = found.get(name, found.get(f"transformer.{name}"))
            assert mine is not None
            torch.testing.assert_close(mine, values, rtol=0, atol=0 if kind != "adapter" else 1e-6)
    assert sorted(tmp_path.rglob("*")) == before


def write_adapter_for(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """An adapter on the query projections of a tiny Llama; {tensor: its change}."""
    source = open_source(model)
    size = source.tensors["model.layers.0.self_attn.q_proj.weight"].shape[0]
    source.close()
    return {name: change.float() for name, change in write_adapter(folder, size=size, layers=(0, 1)).items()}


def test_an_adapter_on_its_base_is_a_virtual_model(tmp_path: Path) -> None:
    base = layered(0)
    save(tmp_path / "base", base)
    changes = write_adapter(tmp_path / "adapter")
    with closing(adapted(open_source(tmp_path / "base"), tmp_path / "adapter")) as virtual:
        for name, info in virtual.tensors.items():
            right = base[name].float() + changes[name].float() if name in changes else base[name]
            assert info.dtype == str(right.dtype).removeprefix("torch.")
            read = virtual.read(name, 0, info.num_elements)
            assert read.tobytes() == right.contiguous().view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("role", ["base", "tuned"])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_what_is_not_finite_is_refused_in_a_slice_as_in_a_whole(
    tmp_path: Path, role: str, value: float, scale: float
) -> None:
    name = "model.norm.weight"
    pair = {"base": layered(0, torch.float32), "tuned": nudged(layered(0), 1)}
    pair[role][name][20] = value
    base, tuned = (save(tmp_path / side, tensors) for side, tensors in pair.items())
    with closing(open_virtual(base, tuned, scale)) as virtual:
        assert virtual.read(name, 0, 20).size == 20
        assert virtual.read(name, 21, 33).size == 12
        with pytest.raises(InputError, match=f"{name}: NaN or infinity"):
            virtual.read(name, 20, 21)
    with pytest.raises(InputError, match=f"{name}: NaN or infinity"):
        subtract(base, tuned, scale, tmp_path / "out")


def test_a_slice_that_overflows_its_dtype_is_refused(tmp_path: Path) -> None:
    base = layered(0, torch.float32)
    tuned = {name: values.clone() for name, values in base.items()}
    tuned["model.norm.weight"][3] = 1e6
    paths = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    with closing(open_virtual(*paths, 1.0, "float16")) as virtual:
        with pytest.raises(InputError, match=r"model\.norm\.weight: NaN or infinity"):
            virtual.read("model.norm.weight", 0, 33)


def test_a_weight_that_an_adapter_leaves_alone_must_be_finite_too(tmp_path: Path) -> None:
    base = layered(0)
    base["model.norm.weight"][3] = torch.nan
    save(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter")
    with closing(open_virtual(tmp_path / "base", tmp_path / "adapter", 0.3)) as virtual:
        with pytest.raises(InputError, match=r"model\.norm\.weight: NaN or infinity in the base"):
            virtual.read("model.norm.weight", 0, 33)


def test_an_alias_reads_its_owner(tmp_path: Path) -> None:
    base, tuned = layered(0, torch.float32), nudged(layered(0), 1)
    del base["lm_head.weight"], tuned["lm_head.weight"]
    save(tmp_path / "base", base)
    folder = Checkpoint(2, 2, [tuned], aliases={"lm_head.weight": "model.embed_tokens.weight"}).write(
        tmp_path / "c"
    )
    with closing(open_virtual(folder, save(tmp_path / "tuned", tuned), 0.5)) as virtual:
        assert virtual.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
        assert np.array_equal(
            virtual.read("lm_head.weight", 5, 50), virtual.read("model.embed_tokens.weight", 5, 50)
        )


def test_memory_does_not_grow_with_the_slice(tmp_path: Path) -> None:
    """What a thread takes is known beforehand: rooms for a chunk's elements, and a few blocks."""
    base, tuned = models(tmp_path, "safetensors")
    with closing(open_virtual(base, tuned, 0.7)) as virtual:
        before = virtual.thread_bytes
        for name, info in virtual.tensors.items():
            virtual.read(name, 0, info.num_elements)
        rooms = [reader._own.area for reader in (virtual._reader, virtual.vector._reader)]  # type: ignore[attr-defined]
        assert sum(map(len, rooms)) < before == virtual.thread_bytes


def test_one_thread_uses_one_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many processors there are: the memory of those that are never taken is never touched."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    used = set()
    whole = Arithmetic.subtract

    def watched(arithmetic: Arithmetic, *arguments: Any) -> Any:
        used.add(id(arithmetic))
        return whole(arithmetic, *arguments)

    monkeypatch.setattr(Arithmetic, "subtract", watched)
    base, tuned = models(tmp_path, "safetensors")
    subtract(base, tuned, 0.7, tmp_path / "out", memory="14MiB")
    assert len(used) == 1


def test_an_adapter_that_is_being_written_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "base", layered(0))
    write_adapter(tmp_path / "adapter")
    (tmp_path / "adapter/.incomplete").mkdir()
    with closing(open_source(tmp_path / "base")) as base:
        for refuse in (lambda: adapted(base, tmp_path / "adapter"), lambda: inspect(tmp_path / "adapter")):
            with pytest.raises(InputError, match="is not whole"):
                refuse()


def test_a_virtual_model_may_be_a_base(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, "safetensors")
    write_adapter(tmp_path / "adapter")
    subtract(base, tuned, 0.7, tmp_path / "one")
    subtract(tmp_path / "one", tmp_path / "adapter", -1.0, tmp_path / "two")
    virtual = adapted(open_virtual(base, tuned, 0.7), tmp_path / "adapter")
    with closing(virtual), closing(SafetensorsSource(tmp_path / "two")) as written:
        for name, info in written.tensors.items():
            right = written.read(name, 0, info.num_elements)
            assert np.array_equal(_bits(virtual.read(name, 0, info.num_elements)), _bits(right)), name
        assert virtual.thread_bytes > virtual.base.thread_bytes  # type: ignore[attr-defined]
