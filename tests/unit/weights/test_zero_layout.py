"""ZeRO partitions of any shapes and world size, in any slices; and what DeepSpeed never writes."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from delta_models import tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zero_checkpoint import Checkpoint

from pipeline.errors import InputError
from pipeline.weights.formats.open import open_source

shapes = st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=1, max_size=4)


def tensors(prefix: str, sizes: list[list[int]]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{i}": torch.randn(size) for i, size in enumerate(sizes)}


@given(
    st.sampled_from([1, 2, 3]),
    st.integers(1, 12),
    st.lists(shapes, min_size=1, max_size=3),
    shapes,
    st.data(),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    stage: int,
    world_size: int,
    groups: list[list[list[int]]],
    frozen: list[list[int]],
    data: st.DataObject,
) -> None:
    trained = [tensors(f"g{i}.", group) for i, group in enumerate(groups)]
    kept = {name: values.bfloat16() for name, values in tensors("frozen.", frozen).items()}
    buffers = {"steps": torch.arange(3)}
    folder = tmp_path_factory.mktemp("zero")
    Checkpoint(stage, world_size, trained, kept, buffers, {"head": "g0.0"}).write(folder)
    source = open_source(folder)
    expected = kept | buffers
    for group in trained:
        expected |= group
    assert (
        source.kind == f"zero-{stage}"
        and source.tensors.keys() == expected.keys()
        and source.aliases == {"head": "g0.0"}
    )
    for name, saved in expected.items():
        start = data.draw(st.integers(0, saved.numel()))
        stop = data.draw(st.integers(start, saved.numel()))
        values = tensor(source, name, start, stop)
        assert source.tensors[name].shape == tuple(saved.shape) and values.dtype == saved.dtype
        assert torch.equal(values, saved.flatten()[start:stop])
    source.close()


@pytest.mark.parametrize("stage", [2, 3])
def test_location_is_where_the_bytes_lie(tmp_path: Path, stage: int) -> None:
    weight = torch.randn(9, 5)
    source = open_source(Checkpoint(stage, 3, [{"a": torch.randn(4), "weight": weight}]).write(tmp_path))
    extents = source.locate("weight", 1, 44)
    read = b"".join(
        file.path.read_bytes()[offset : offset + num_bytes] for file, offset, num_bytes in extents
    )
    assert len({file.path for file, _, _ in extents}) > 1 and read == weight.flatten()[1:44].numpy().tobytes()


def test_the_names_of_the_base_are_taken(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"wte.weight": torch.zeros(3, 2), "ln_f.bias": torch.zeros(2)}, tmp_path / "base.safetensors")
    masters = {"transformer.wte.weight": torch.randn(3, 2), "transformer.ln_f.bias": torch.randn(2)}
    folder = Checkpoint(2, 2, [masters], aliases={"lm_head.weight": "transformer.wte.weight"}).write(
        tmp_path / "zero"
    )
    source = open_source(folder, open_source(tmp_path / "base.safetensors"))
    assert source.tensors.keys() == {"wte.weight", "ln_f.bias"} and source.aliases == {
        "lm_head.weight": "wte.weight"
    }
    assert torch.equal(tensor(source, "lm_head.weight"), masters["transformer.wte.weight"].flatten())


def test_deepspeeds_own_classes_are_read_without_deepspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 runs keep a DynamicLossScaler in the file."""
    name = "deepspeed.runtime.fp16.loss_scaler"
    scaler = type("DynamicLossScaler", (), {"__module__": name})
    module = ModuleType(name)
    module.DynamicLossScaler = scaler  # type: ignore[attr-defined]
    folder = Checkpoint(2, 1, [{"a": torch.ones(3)}]).write(tmp_path)
    path = folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with monkeypatch.context() as patch:
        for package in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16"):
            patch.setitem(sys.modules, package, ModuleType(package))
        patch.setitem(sys.modules, name, module)
        content = torch.load(path, weights_only=False)
        instance = scaler()
        instance.cur_scale = 65536.0
        content["optimizer_state_dict"]["loss_scaler"] = instance
        torch.save(content, path)
    assert torch.equal(tensor(open_source(folder), "a"), torch.ones(3))


def test_a_stage_as_debian_12s_python_pickles_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.0 to 3.11.3 write an Enum's member as getattr(class, name)."""
    name = "deepspeed.runtime.zero.config"
    module = ModuleType(name)

    class ZeroStageEnum(int, Enum):
        gradients = 2

        def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
            return getattr, (type(self), self.name)

    ZeroStageEnum.__module__, ZeroStageEnum.__qualname__ = name, "ZeroStageEnum"
    module.ZeroStageEnum = ZeroStageEnum  # type: ignore[attr-defined]
    folder = Checkpoint(2, 1, [{"a": torch.ones(3)}]).write(tmp_path)
    path = folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=True)
    content["optimizer_state_dict"]["zero_stage"] = ZeroStageEnum.gradients
    with monkeypatch.context() as patch:
        for package in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero"):
            patch.setitem(sys.modules, package, ModuleType(package))
        patch.setitem(sys.modules, name, module)
        torch.save(content, path)
    assert open_source(folder).kind == "zero-2"


def write_steps(folder: Path, *steps: Any) -> Path:
    """A checkpoint of as many ranks, whose optimizer states say these steps."""
    tag = Checkpoint(2, len(steps), [{"a": torch.ones(5)}]).write(folder)
    for rank, step in enumerate(steps):
        path = tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        content = torch.load(path, weights_only=True)
        content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = step
        torch.save(content, path)
    return tag


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
]


@pytest.mark.parametrize(
    "step", [7, 7.0, torch.tensor([7.0]), *(torch.tensor(7, dtype=dtype) for dtype in DTYPES)], ids=repr
)
def test_an_optimizers_step_is_the_same_number_whatever_it_is_stored_as(tmp_path: Path, step: Any) -> None:
    assert open_source(write_steps(tmp_path / "same", step, torch.tensor(7.0))).kind == "zero-2"
    with pytest.raises(
        InputError, match=r"optimizer step 8\.0, .* has 7\.0; files of different saves are mixed"
    ):
        open_source(write_steps(tmp_path / "mixed", step, torch.tensor(8.0)))


@pytest.mark.parametrize(
    "step", ["7", None, 10**400, torch.ones(2), torch.zeros(0)], ids=["text", "none", "huge", "two", "empty"]
)
def test_a_step_that_is_no_number_is_another_step(tmp_path: Path, step: Any) -> None:
    with pytest.raises(InputError, match="files of different saves are mixed"):
        open_source(write_steps(tmp_path, torch.tensor(7.0), step))


JUNK: list[Any] = [
    None,
    3,
    -1,
    "text",
    [],
    {},
    [3],
    {"a": 3},
    {3: "a"},
    (1, "x"),
    [[None]],
    torch.ones(2),
    [torch.ones(2)],
    float("nan"),
]
KEYS = [
    ("optim", ("optimizer_state_dict",)),
    ("optim", ("ds_config",)),
    ("optim", ("optimizer_state_dict", "zero_stage")),
    ("optim", ("optimizer_state_dict", "partition_count")),
    ("optim", ("optimizer_state_dict", "single_partition_of_fp32_groups")),
    ("optim", ("optimizer_state_dict", "fp32_flat_groups")),
    ("optim", ("optimizer_state_dict", "base_optimizer_state")),
    ("optim", ("optimizer_state_dict", "param_alignment_paddings")),
    ("model", ("module",)),
    ("model", ("buffer_names",)),
    ("model", ("param_shapes",)),
    ("model", ("frozen_param_shapes",)),
    ("model", ("frozen_param_fragments",)),
    ("model", ("shared_params",)),
    ("model", ("global_steps",)),
    ("model", ("mp_world_size",)),
]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("kind", "keys"), KEYS)
def test_junk_in_a_file_is_one_line_or_harmless(
    tmp_path: Path, stage: int, kind: str, keys: tuple[str, ...]
) -> None:
    weight = torch.randn(5)
    for i, junk in enumerate(JUNK):
        folder = Checkpoint(stage, 1, [{"weight": weight}], {"kept": torch.ones(2)}).write(tmp_path / str(i))
        [path] = folder.glob(f"*_{kind}_states.pt")
        content = torch.load(path, weights_only=True)
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = junk
        torch.save(content, path)
        try:
            source = open_source(folder)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            for name, info in source.tensors.items():
                source.read(name, 0, info.num_elements)
