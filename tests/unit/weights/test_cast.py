"""Casting a source while it is read: every value as torch casts it, everything else as it is."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from delta_models import save, tensor
from zero_checkpoint import Checkpoint

from pipeline.weights import stream
from pipeline.weights.cast import Cast
from pipeline.weights.formats.open import open_source
from pipeline.weights.source import DTYPE_BYTES, TensorInfo

FLOATS = ["float64", "float32", "float16", "bfloat16"]
OTHERS = ["int64", "int32", "int16", "int8", "uint8", "bool"]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def every_kind(dtype: str) -> torch.Tensor:
    """Numbers of `dtype`: all that there are of 16 bits, of more bits many of each exponent."""
    kind, size = getattr(torch, dtype), DTYPE_BYTES[dtype]
    if size == 2:
        return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(kind)
    generator = torch.Generator().manual_seed(0)
    lowest = torch.iinfo(BITS[size]).min
    anything = torch.randint(lowest, -lowest - 1, (1 << 16,), dtype=BITS[size], generator=generator).view(
        kind
    )
    narrow = [every_kind(other).to(kind) for other in ("float16", "bfloat16")]
    halfway = [(values[1:] + values[:-1]) / 2 for values in narrow]  # between neighbours: ties
    beside = [
        torch.nextafter(values, torch.tensor(to, dtype=kind)) for values in halfway for to in (-9e9, 9e9)
    ]
    return torch.cat([anything, *narrow, *halfway, *beside])


@pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_cast_as_torch_does(tmp_path: Path, dtype: str, target: str) -> None:
    values = every_kind(dtype)
    right = values.to(getattr(torch, target))
    source = Cast(open_source(save(tmp_path, {"w": values})), target)
    assert source.tensors == {"w": TensorInfo("w", (values.numel(),), target)}
    read = tensor(source, "w")
    assert read.dtype == right.dtype and torch.equal(read.isnan(), right.isnan())
    bits = BITS[DTYPE_BYTES[target]]
    is_number = ~right.isnan()
    assert torch.equal(read.view(bits)[is_number], right.view(bits)[is_number]), (
        "the sign of zero counts, too"
    )


@pytest.mark.parametrize("target", FLOATS)
def test_integers_and_booleans_are_kept(tmp_path: Path, target: str) -> None:
    tensors = {dtype: torch.arange(-3, 5).to(getattr(torch, dtype)) for dtype in OTHERS}
    source = Cast(open_source(save(tmp_path, tensors)), target)
    for name, saved in tensors.items():
        assert source.tensors[name].dtype == name
        assert torch.equal(tensor(source, name), saved)


def test_tied_names_are_cast_as_their_owner(tmp_path: Path) -> None:
    weight = torch.randn(9, 5)
    stored = open_source(Checkpoint(2, 2, [{"w": weight}], aliases={"head": "w"}).write(tmp_path))
    source = Cast(stored, "bfloat16")
    assert source.aliases == {"head": "w"} and source.tensors.keys() == {"w"}
    assert torch.equal(tensor(source, "head", 7, 40), weight.flatten()[7:40].bfloat16())


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "bool"])
def test_values_go_where_the_caller_wants_them(tmp_path: Path, dtype: str, target: str) -> None:
    values = (torch.arange(100) % 7).to(getattr(torch, dtype))
    source = Cast(open_source(save(tmp_path, {"w": values})), target)
    read = source.read("w", 3, 90)
    for fill in (source.read, source.read_noting):
        room = np.zeros(89, read.dtype)
        fill("w", 3, 90, room[1:-1])
        assert np.array_equal(room, np.concatenate([[0], read, [0]]))
    assert source.read("w", 3, 90, room[1:-1]).base is room


def test_nothing_is_noted(tmp_path: Path) -> None:
    source = Cast(open_source(save(tmp_path, {"w": torch.ones(3)})), "float32")
    notes = source.notes("w")
    notes.add(source.read_noting("w", 0, 3, np.empty(3, np.float32)))  # type: ignore[func-returns-value]
    assert notes.finish() == {} and source.is_noted({})


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("dtype", [*FLOATS, "int64", "bool"])
def test_a_threads_memory_is_known_beforehand(tmp_path: Path, dtype: str, target: str) -> None:
    values = torch.ones(1 << 22, dtype=getattr(torch, dtype))
    source = Cast(open_source(save(tmp_path, {"w": values})), target)
    count = stream.CHUNK_BYTES // DTYPE_BYTES[source.tensors["w"].dtype]
    out = source.read("w", 0, count).copy()  # what is made once (tables) is made now
    tracemalloc.start()
    try:
        source.read("w", 0, count, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= source.thread_bytes + (1 << 16)
