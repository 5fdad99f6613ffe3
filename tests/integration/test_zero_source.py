"""Checkpoints of real DeepSpeed runs of 1, 2 and 3 ranks, read in place: bit for bit what the engine held.

Two oracles: DeepSpeed's own zero_to_fp32, and the values that the engine reported before it saved. To run all
of it against another DeepSpeed than the installed one, put that first on the path:

    DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation --target DIR deepspeed==0.16.0
    PYTHONPATH=DIR pytest tests/integration/test_zero_source.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_models import tensor
from packaging.version import Version
from zero_checkpoint import Checkpoint

from pipeline.errors import InputError
from pipeline.weights.formats.open import open_source
from pipeline.weights.formats.zero import ZeroSource

pytestmark = pytest.mark.slow

FROZEN = {"frozen": ["embed.weight", "up.bias"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "frozen": FROZEN,
    "two groups": {"groups": "two", "tied": True},
    "a group of one element": {"groups": "tiny"},
}
CASES: dict[str, dict[str, Any]] = {
    f"stage {stage}, {dtype}, {name}": {"stage": stage, "dtype": dtype, **settings}
    for stage in (1, 2, 3)
    for dtype in ("bf16", "fp32")
    for name, settings in VARIANTS.items()
} | {
    "stage 1, BF16_Optimizer": {"stage": 1, "fp32_gradients": True},
    "stage 1, tied and frozen": {"stage": 1, "tied": True, **FROZEN},
    "stage 3, sub-groups": {"stage": 3, "sub_group_size": 40, "groups": "two", "tied": True, **FROZEN},
    "stage 3, kept whole": {"stage": 3, "persistence": 100_000},
    "stage 2, without frozen": {"stage": 2, "exclude_frozen": True, **FROZEN},
    "stage 3, without frozen": {"stage": 3, "exclude_frozen": True, **FROZEN},
}
LAID_OUT = ["stage 2, bf16, frozen", "stage 3, bf16, two groups", "stage 3, sub-groups"]
UNIVERSAL = ["stage 2, bf16, frozen"]
if Version(version("deepspeed")) >= Version("0.19.8"):  # what older ones cannot, or lay out differently
    CASES["stage 2, parameters aligned"] = {"stage": 2, "parameter_alignment": True, "groups": "two"}
    LAID_OUT.append("stage 2, fp32, a group of one element")
    UNIVERSAL.append("stage 3, sub-groups")
MIXED = {
    "stage 2, later": {"stage": 2, "steps": 3},
    "stage 3, later": {"stage": 3, "steps": 3},
    "round robin": {"stage": 2, "round_robin": True},
}


@pytest.fixture(scope="session", params=[1, 2, 3])
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of save folders, one per case."""
    out = tmp_path_factory.mktemp(f"zero-{request.param}")
    run_ranks(request.param, out, CASES)
    return out


def run_ranks(world_size: int, out: Path, cases: dict[str, Any]) -> None:
    program = [
        sys.executable,
        str(Path(__file__).with_name("make_zero_checkpoints.py")),
        str(out),
        json.dumps(cases),
    ]
    shared = os.environ | {
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    ranks = []
    for rank in range(world_size):
        with (out / f"rank-{rank}.log").open("w") as log:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(program, env=shared | own, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=600) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert not any(codes), "\n".join(
        (out / f"rank-{rank}.log").read_text()[-2000:] for rank in range(world_size)
    )


def oracle(folder: Path, exclude_frozen: bool) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(folder), exclude_frozen_parameters=exclude_frozen)


@pytest.mark.parametrize("name", CASES)
def test_reads_what_the_engine_held(checkpoints: Path, name: str) -> None:
    case, folder = CASES[name], checkpoints / name
    source = open_source(folder)
    assert (
        isinstance(source, ZeroSource) and source.kind == f"zero-{case['stage']}" and source.global_steps == 2
    )
    assert f"zero-{source.world_size}" in folder.parent.name
    assert source.aliases == ({"head.weight": "embed.weight"} if case.get("tied") else {})
    expected = torch.load(folder / "expected.pt", weights_only=True)
    if case.get("exclude_frozen"):
        expected = {
            tensor_name: values
            for tensor_name, values in expected.items()
            if tensor_name not in case["frozen"]
        }
    assert source.tensors.keys() | source.aliases.keys() == expected.keys()
    for tensor_name, held in expected.items():
        values = tensor(source, tensor_name)
        assert values.dtype == held.dtype and torch.equal(values, held.flatten()), tensor_name
        parts = [
            tensor(source, tensor_name, start, min(start + 3, held.numel()))
            for start in range(0, held.numel(), 3)
        ]
        assert torch.equal(torch.cat(parts), values), tensor_name
    frozen = {"scale", "count", "mask", *case.get("frozen", [])}
    trained = [
        tensor_name for tensor_name in expected if source.aliases.get(tensor_name, tensor_name) not in frozen
    ]
    assert all(expected[tensor_name].dtype == torch.float32 for tensor_name in trained)


@pytest.mark.parametrize("name", [name for name in CASES if "BF16_Optimizer" not in name])
def test_reads_what_zero_to_fp32_reads(checkpoints: Path, name: str) -> None:
    source = open_source(checkpoints / name)
    expected = oracle(checkpoints / name, CASES[name].get("exclude_frozen", False))
    if CASES[name]["stage"] == 1 and "frozen" in CASES[name]:  # zero_to_fp32 does not find those
        assert expected.keys() < source.tensors.keys() | source.aliases.keys()
    else:
        assert expected.keys() == source.tensors.keys() | source.aliases.keys()
    for tensor_name, theirs in expected.items():
        assert torch.equal(tensor(source, tensor_name).to(theirs.dtype), theirs.flatten()), tensor_name


@pytest.mark.parametrize("name", LAID_OUT)
def test_the_tests_own_checkpoints_are_laid_out_the_same(
    checkpoints: Path, tmp_path: Path, name: str
) -> None:
    theirs = checkpoints / name / "step-2"
    model = load(theirs, "*mp_rank_00_model_states.pt")[0]
    values = torch.load(checkpoints / name / "expected.pt", weights_only=True)
    groups = [{tensor_name: values[tensor_name] for tensor_name in group} for group in model["param_shapes"]]
    frozen = {tensor_name: values[tensor_name] for tensor_name in model["frozen_param_shapes"] or {}}
    buffers = {tensor_name: values[tensor_name] for tensor_name in model["buffer_names"]}
    optims = load(theirs, "*_optim_states.pt")
    ours = Checkpoint(
        CASES[name]["stage"], len(optims), groups, frozen, buffers, model["shared_params"]
    ).write(tmp_path)
    for mine, original in zip(load(ours, "*_optim_states.pt"), optims, strict=True):
        key = "fp32_flat_groups" if CASES[name]["stage"] == 3 else "single_partition_of_fp32_groups"
        flats, expected = mine["optimizer_state_dict"][key], original["optimizer_state_dict"][key]
        assert [flat.untyped_storage().nbytes() for flat in flats] == [
            flat.untyped_storage().nbytes() for flat in expected
        ]
        assert all(same_but_padding(flat, other) for flat, other in zip(flats, expected, strict=True))
    for mine, original in zip(
        load(ours, "*_model_states.pt"), load(theirs, "*_model_states.pt"), strict=True
    ):
        for key in ("buffer_names", "param_shapes", "shared_params", "global_steps"):
            assert mine[key] == original[key], key
        assert dict(mine["frozen_param_shapes"]) == dict(original["frozen_param_shapes"] or {})
        fragments = original["frozen_param_fragments"] or {}
        assert mine["frozen_param_fragments"].keys() == fragments.keys()
        assert all(
            same_but_padding(mine["frozen_param_fragments"][tensor_name], fragments[tensor_name])
            for tensor_name in fragments
        )


def same_but_padding(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Where ours has NaN, theirs has whatever was in memory."""
    return torch.equal(torch.where(ours.isnan(), 0, ours), torch.where(ours.isnan(), 0, theirs))


def load(folder: Path, pattern: str) -> list[dict[str, Any]]:
    import deepspeed  # noqa: F401 - its classes are in the files

    return [torch.load(path, weights_only=False) for path in sorted(folder.glob(pattern))]


def damaged(checkpoints: Path, name: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint's tag folder, to be damaged."""
    return Path(shutil.copytree(checkpoints / name / "step-2", tmp_path / "copy"))


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zero-damaged")
    run_ranks(
        2,
        out,
        MIXED
        | {
            name: CASES[name]
            for name in ("stage 2, bf16, plain", "stage 3, bf16, plain", "stage 3, bf16, frozen", *UNIVERSAL)
        },
    )
    return out


@pytest.mark.parametrize("name", UNIVERSAL)
def test_reads_universal_checkpoints(two_ranks: Path, tmp_path: Path, name: str) -> None:
    folders = [
        "--input_folder",
        str(two_ranks / name / "step-2"),
        "--output_folder",
        str(tmp_path / "step-2_universal"),
    ]
    convert = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
        "--num_extract_workers",
        "1",
    ]
    subprocess.run(
        [*convert, "--num_merge_workers", "1", *folders], check=True, capture_output=True, timeout=300
    )
    source, original = open_source(tmp_path), open_source(two_ranks / name)
    assert (
        source.kind == "universal"
        and source.tensors == original.tensors
        and source.aliases == original.aliases
    )
    for tensor_name in source.tensors:
        assert torch.equal(tensor(source, tensor_name), tensor(original, tensor_name)), tensor_name
    (tmp_path / "step-2_universal" / "zero" / "gate" / "fp32.pt").unlink()
    with pytest.raises(InputError, match="gate"):
        open_source(tmp_path)


def remove(*names: str) -> Callable[[Path, Path], None]:
    def do(folder: Path, others: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return do


def take(name: str, case: str) -> Callable[[Path, Path], None]:
    def do(folder: Path, others: Path) -> None:
        shutil.copy(others / case / "step-2" / name, folder / name)

    return do


def truncate(name: str) -> Callable[[Path, Path], None]:
    def do(folder: Path, others: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size // 2)

    return do


def rename(old: str, new: str) -> Callable[[Path, Path], None]:
    def do(folder: Path, others: Path) -> None:
        (folder / old).rename(folder / new)

    return do


def double(old: str, new: str) -> Callable[[Path, Path], None]:
    def do(folder: Path, others: Path) -> None:
        shutil.copy(folder / old, folder / new)

    return do


OPTIM = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL_3 = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
DAMAGES: dict[str, tuple[str, Callable[[Path, Path], None], str]] = {
    "last rank gone": ("stage 2, bf16, plain", remove(OPTIM.format(1)), "saved by 2 ranks"),
    "first rank gone": ("stage 2, bf16, plain", remove(OPTIM.format(0)), "ranks 0 are missing"),
    "all ranks gone": ("stage 2, bf16, plain", remove(OPTIM.format(0), OPTIM.format(1)), "stage 0"),
    "a rank too many": ("stage 2, bf16, plain", double(OPTIM.format(1), OPTIM.format(2)), "files of 3"),
    "a rank twice": ("stage 2, bf16, plain", double(OPTIM.format(1), OPTIM.format(1)[5:]), "same rank"),
    "model states gone": ("stage 2, bf16, plain", remove("mp_rank_00_model_states.pt"), "model_states"),
    "a rank's model states gone": ("stage 3, bf16, plain", remove(MODEL_3.format(1)), "rank_1.*model_states"),
    "cut": ("stage 3, bf16, plain", truncate(OPTIM.format(1)), "truncated"),
    "a later rank": ("stage 2, bf16, plain", take(OPTIM.format(1), "stage 2, later"), "optimizer step 3"),
    "a later rank's weights": (
        "stage 3, bf16, plain",
        take(OPTIM.format(1), "stage 3, later"),
        "optimizer step 3",
    ),
    "a later rank's model": ("stage 3, bf16, plain", take(MODEL_3.format(1), "stage 3, later"), "step 3"),
    "another stage's rank": ("stage 2, bf16, plain", take(OPTIM.format(1), "stage 3, bf16, plain"), "stage"),
    "another model's rank": (
        "stage 3, bf16, plain",
        take(OPTIM.format(1), "stage 3, bf16, frozen"),
        "elements instead of",
    ),
    "another model's names": (
        "stage 3, bf16, frozen",
        take(MODEL_3.format(0), "stage 3, bf16, plain"),
        "elements instead of",
    ),
    "frozen parts of another": (
        "stage 3, bf16, frozen",
        take(MODEL_3.format(1), "stage 3, bf16, plain"),
        "frozen",
    ),
    "tensor parallel": (
        "stage 2, bf16, plain",
        rename(OPTIM.format(1), OPTIM.format(1).replace("mp_rank_00", "mp_rank_01")),
        "parallel",
    ),
    "experts": (
        "stage 2, bf16, plain",
        rename(OPTIM.format(1), "expp_rank_0_mp_rank_00_optim_states.pt"),
        "parallel",
    ),
    "round robin": ("round robin", lambda folder, others: None, "round_robin_gradients"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_mixed_checkpoint_is_one_line(two_ranks: Path, tmp_path: Path, name: str) -> None:
    case, damage, message = DAMAGES[name]
    folder = damaged(two_ranks, case, tmp_path)
    damage(folder, two_ranks)
    with pytest.raises(InputError, match=message) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tag", ["", "step-9", "../elsewhere"])
def test_latest_that_names_no_folder(two_ranks: Path, tmp_path: Path, tag: str) -> None:
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(InputError, match="latest"):
        open_source(tmp_path)
