"""The product of two factors on the disk: the same in any slices; a panel of a factor is all in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.delta import low_rank
from pipeline.delta.low_rank import Product
from pipeline.weights.floats import Array
from pipeline.weights.formats.safetensors import SafetensorsSource
from pipeline.weights.stored import StoredTensor

SCALING = 0.7
MIB = 1 << 20


def store(folder: Path, b: torch.Tensor, a: torch.Tensor, is_transposed: bool) -> Product:
    save_file({"a": a, "b": b}, folder / "factors.safetensors")
    return Product(SafetensorsSource(folder / "factors.safetensors"), "a", "b", SCALING, is_transposed)


def read(change: Product, start: int, stop: int) -> torch.Tensor:
    return change.read(start, stop, torch.full([change.room_elements], torch.nan, dtype=torch.float64))


@given(
    sizes=st.tuples(*[st.integers(1, 20)] * 3),
    is_transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    limits=st.tuples(*[st.integers(1, 150)] * 3),
    data=st.data(),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_block_and_panel_give_the_whole(
    tmp_path: Path,
    sizes: tuple[int, int, int],
    is_transposed: bool,
    dtype: torch.dtype,
    limits: tuple[int, int, int],
    data: st.DataObject,
) -> None:
    height, width, rank = sizes
    b, a = torch.randn(height, rank).to(dtype), torch.randn(rank, width).to(dtype)
    product = ((b.double() @ a.double()) * SCALING).float()
    change = store(tmp_path, b, a, is_transposed)
    cuts = data.draw(st.lists(st.integers(0, height * width), max_size=4))
    bounds = [0, *sorted(cuts), height * width]
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in zip(("GRID_ELEMENTS", "PANEL_ELEMENTS", "BAND_ELEMENTS"), limits, strict=True):
            patch.setattr(low_rank, name, limit)
        parts = [read(change, start, stop) for start, stop in zip(bounds, bounds[1:])]  # noqa: B905, RUF007
    assert torch.equal(torch.cat(parts), (product.T if is_transposed else product).flatten())


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("height", "width", "rank"), [(40000, 64, 32), (64, 40000, 32), (700, 700, 600)])
def test_a_slice_reads_a_panel_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int, rank: int, is_transposed: bool
) -> None:
    for name, limit in (("GRID_ELEMENTS", 1 << 12), ("PANEL_ELEMENTS", 1 << 14), ("BAND_ELEMENTS", 1 << 11)):
        monkeypatch.setattr(low_rank, name, limit)
    change = store(tmp_path, torch.randn(height, rank), torch.randn(rank, width), is_transposed)
    num_read = []
    original = StoredTensor.read

    def counted(self: StoredTensor, start: int, stop: int, out: Array | None = None) -> Array:
        num_read.append(stop - start)
        return original(self, start, stop, out)

    monkeypatch.setattr(StoredTensor, "read", counted)
    read(change, 100_000, 200_000)
    assert 0 < max(num_read) <= 1 << 11
    assert change.room_elements <= (1 << 14) + (1 << 13) + (1 << 12)
    assert change.working_bytes(100_000) <= 4 * (100_000 + 2 * max(height, width)) + 8 * (1 << 13)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(152064, 256), (256, 152064), (16384, 16384)])
def test_memory_does_not_grow_with_the_factors(
    tmp_path: Path, shape: tuple[int, int], is_transposed: bool
) -> None:
    """Of 2**20 elements.

    They are 4 MiB (and two rows); panels are 8 MiB and 4 MiB; a block and what was just read come on top.
    """
    change = store(
        tmp_path,
        torch.zeros(shape[0], 256, dtype=torch.bfloat16),
        torch.zeros(256, shape[1], dtype=torch.bfloat16),
        is_transposed,
    )
    assert 8 * change.room_elements + change.working_bytes(MIB) <= 20 * MIB
