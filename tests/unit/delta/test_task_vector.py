"""Task vectors: an adapter's product or two models' difference, by the base's names; misfits are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delta_models import layered, nudged, save, tensor
from safetensors.torch import save_file
from zero_checkpoint import Checkpoint

from pipeline.delta.task_vector import Difference, LowRank, TaskVector, open_vector
from pipeline.delta.virtual import adapted
from pipeline.errors import InputError
from pipeline.weights.formats.open import open_source

Q, K, DOWN, NORM = (
    "model.layers.0.q_proj.weight",
    "model.layers.0.k_proj.weight",
    "model.layers.1.down_proj.weight",
    "model.norm.weight",
)
BASE = {
    Q: torch.randn(6, 10).bfloat16(),
    K: torch.randn(6, 6),
    DOWN: torch.randn(10, 7),
    NORM: torch.randn(10).bfloat16(),
}
FACTORS = {
    "base_model.model.model.layers.0.q_proj.lora_A.weight": torch.randn(3, 10),
    "base_model.model.model.layers.0.q_proj.lora_B.weight": torch.randn(6, 3),
    "base_model.model.model.layers.1.down_proj.lora_A.weight": torch.randn(2, 7).bfloat16(),
    "base_model.model.model.layers.1.down_proj.lora_B.weight": torch.randn(10, 2).bfloat16(),
}
CONFIG = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 12,
    "rank_pattern": {"down_proj": 2},
    "alpha_pattern": {r"layers\.1\.down_proj": 5},
}


def write(
    folder: Path,
    config: Mapping[str, Any] = CONFIG,
    factors: Mapping[str, torch.Tensor] = FACTORS,
    base: Mapping[str, torch.Tensor] = BASE,
) -> LowRank:
    """An adapter in `folder/adapter`, opened on the base in `folder/base`."""
    save(folder / "base", base)
    (folder / "adapter").mkdir(exist_ok=True)
    save_file(dict(factors), folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    vector = open_vector(folder / "adapter", open_source(folder / "base"))
    assert isinstance(vector, LowRank)
    return vector


def change(vector: TaskVector, name: str, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of the change of an adapter, for which neither base nor room is needed."""
    nothing = np.full(stop - start, np.nan, np.float32)
    values = vector.slice(name, start, stop).compute(slice(0, stop - start), nothing, nothing.copy())
    return torch.from_numpy(values.copy())


def product(module: str, scaling: float) -> torch.Tensor:
    a, b = (FACTORS[f"base_model.model.{module}.lora_{factor}.weight"].double() for factor in "AB")
    return (b @ a * scaling).float()


def test_an_adapters_change_is_the_product_of_its_factors(tmp_path: Path) -> None:
    vector = write(tmp_path)
    assert set(vector.names) == {Q, DOWN} and vector.notes == []
    assert torch.equal(change(vector, Q, 0, 60).view(6, 10), product("model.layers.0.q_proj", 4.0))
    assert torch.equal(change(vector, DOWN, 0, 70).view(10, 7), product("model.layers.1.down_proj", 2.5))
    assert vector.slice(Q, 5, 20).read == {}, "nothing is noted of what machines may round differently"


def test_the_change_is_added_in_float32_and_the_rest_is_the_base(tmp_path: Path) -> None:
    write(tmp_path).close()
    changes = {Q: product("model.layers.0.q_proj", 4.0), DOWN: product("model.layers.1.down_proj", 2.5)}
    with closing(adapted(open_source(tmp_path / "base"), tmp_path / "adapter")) as source:
        assert source.tensors.keys() == BASE.keys()
        for name, saved in BASE.items():
            values = tensor(source, name).view(saved.shape)
            if name in changes:
                assert source.tensors[name].dtype == "float32"
                assert torch.equal(values, saved.float() + changes[name])
            else:
                assert values.dtype == saved.dtype and torch.equal(values, saved)


def test_rank_stabilised_scaling(tmp_path: Path) -> None:
    vector = write(tmp_path, CONFIG | {"use_rslora": True})
    assert torch.equal(change(vector, Q, 0, 60).view(6, 10), product("model.layers.0.q_proj", 12 / 3**0.5))


def test_a_conv1d_base_has_the_change_transposed(tmp_path: Path) -> None:
    turned = {name: saved.T.contiguous() if saved.dim() == 2 else saved for name, saved in BASE.items()}
    vector = write(tmp_path, CONFIG | {"fan_in_fan_out": True}, base=turned)
    assert torch.equal(change(vector, Q, 0, 60).view(10, 6), product("model.layers.0.q_proj", 4.0).T)


@pytest.mark.parametrize("is_conv1d", [True, False])
def test_a_square_weight_is_read_as_the_config_says(tmp_path: Path, is_conv1d: bool) -> None:
    a, b = torch.randn(3, 6), torch.randn(6, 3)
    prefix = "base_model.model.model.layers.0.k_proj"
    factors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    vector = write(tmp_path, CONFIG | {"fan_in_fan_out": is_conv1d}, factors)
    right = (b.double() @ a.double() * 4).float()
    assert torch.equal(change(vector, K, 0, 36).view(6, 6), right.T if is_conv1d else right)


def test_threads_do_not_write_over_each_others_panels(tmp_path: Path) -> None:
    a, b = torch.randn(3, 2000), torch.randn(500, 3)
    prefix = "base_model.model.model.layers.0.q_proj"
    factors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    vector = write(tmp_path, factors=factors, base={Q: torch.zeros(500, 2000)})
    starts = range(0, 1_000_000, 100_000)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: change(vector, Q, start, start + 100_000), starts))
    assert torch.equal(torch.cat(parts).view(500, 2000), (b.double() @ a.double() * 4).float())


def test_torchs_own_threads_rest_while_several_read(tmp_path: Path) -> None:
    """They would multiply with those that read; afterwards they are as they were."""
    vector, before = write(tmp_path), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), vector.many_threads():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_base_without_the_prefix(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): saved for name, saved in BASE.items()}
    assert set(write(tmp_path, base=bare).names) == {"layers.0.q_proj.weight", "layers.1.down_proj.weight"}


MISFITS = [
    (
        {f"base_model.model.model.other.lora_{factor}.weight": torch.ones(3, 3) for factor in "AB"},
        r"lacks.*model\.other",
    ),
    ({"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(3, 11)}, "another model"),
]


@pytest.mark.parametrize(("added", "message"), MISFITS)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, added: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path, factors=FACTORS | added)


def test_an_adapter_on_an_empty_or_quantised_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.norm\.weight is empty"):
        write(tmp_path, base=BASE | {NORM: torch.empty(0)})
    with pytest.raises(InputError, match=r"k_proj\.weight is quantised"):
        write(tmp_path, base=BASE | {K: torch.zeros(6, 6, dtype=torch.int8)})


def test_of_a_lora_run_the_adapter_is_taken(tmp_path: Path) -> None:
    """The Trainer leaves a ZeRO checkpoint of what ran beside it."""
    write(tmp_path).close()
    Checkpoint(2, 2, [FACTORS]).write(tmp_path / "adapter")
    vector = open_vector(tmp_path / "adapter", open_source(tmp_path / "base"))
    assert isinstance(vector, LowRank) and set(vector.names) == {Q, DOWN}


def test_a_difference_is_tuned_minus_base(tmp_path: Path) -> None:
    base = layered(0) | {"steps": torch.arange(7)}
    tuned = nudged(layered(0), 1) | {"steps": torch.arange(7) + 1}
    paths = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    with closing(open_vector(paths[1], open_source(paths[0]))) as vector:
        assert isinstance(vector, Difference) and set(vector.names) == layered(0).keys()
        for name in vector.names:
            count = base[name].numel() - 3
            wide = base[name].float().flatten().numpy()[3:]
            found = vector.slice(name, 3, count + 3)
            assert found.read["tuned"].tolist() == tuned[name].flatten()[3:].tolist()
            for block in (slice(0, 1), slice(1, count)):
                values = found.compute(block, wide[block], np.empty_like(wide[block]))
                right = tuned[name].flatten()[3:][block] - torch.from_numpy(wide[block])
                assert torch.equal(torch.from_numpy(values), right)


def test_a_tuned_model_that_does_not_fit_is_let_go(tmp_path: Path) -> None:
    base = save(tmp_path / "base", layered(0))
    tuned = save(tmp_path / "tuned", {"model.norm.weight": torch.ones(33)})
    with closing(open_source(base)) as source:
        with pytest.raises(InputError, match="missing") as caught:
            open_vector(tuned, source)
        assert open_files(tmp_path) == [base / "model.safetensors"]
    assert caught.tb is not None, "till here it keeps the frames, and what they hold, alive"


def open_files(folder: Path) -> list[Path]:
    """The files under `folder` that this process has open."""
    links = [Path(os.path.realpath(link)) for link in Path("/proc/self/fd").iterdir()]
    return [path for path in links if path.is_relative_to(folder)]
