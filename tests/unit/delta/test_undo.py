from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from delta_models import layered, load, nudged, save, write_pair
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifact import write_json
from pipeline.delta.subtract import subtract
from pipeline.delta.undo import MOST_AMPLIFIED, say_how_exact, undo, undoing_scale
from pipeline.delta.verify import Verdict, verify
from pipeline.errors import InputError
from pipeline.weights.digest import content_digest

LARGE = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("scale", [0.3, 1.7, -0.5])
def test_a_16_bit_base_comes_back_bit_for_bit(tmp_path: Path, scale: float) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, scale, tmp_path / "out")
    undo(tmp_path / "out", tmp_path / "back")
    back, right = load(tmp_path / "back"), load(base)
    assert back.keys() == right.keys()
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], right[name]) for name in right)
    assert verify(tmp_path / "back") == Verdict([], [])
    assert (
        say_how_exact(tmp_path / "out", tmp_path / "back")
        == f"{len(right)} of {len(right)} tensors are the base's bit for bit"
    )


@pytest.mark.parametrize("scale", [0.3, 2.0, -0.8])
def test_a_float32_base_comes_back_within_rounding(tmp_path: Path, scale: float) -> None:
    base = layered(0, torch.float32)
    subtract(
        save(tmp_path / "base", base), save(tmp_path / "tuned", nudged(base, 1)), scale, tmp_path / "out"
    )
    undo(tmp_path / "out", tmp_path / "back")
    back = load(tmp_path / "back")
    assert all(
        (back[name] - values).abs().max() <= 8 * MOST_AMPLIFIED * 2.0**-24 * values.abs().max()
        for name, values in base.items()
    )
    num_equal = sum(back[name].equal(values) for name, values in base.items())
    assert say_how_exact(tmp_path / "out", tmp_path / "back").startswith(
        f"{num_equal} of {len(base)} tensors are the base's bit for bit, the"
    )


def test_a_mixed_base_gets_its_dtypes_back(tmp_path: Path) -> None:
    base = layered(0) | {"model.norm.weight": torch.randn(33), "count": torch.arange(4)}
    tuned = nudged(layered(0), 1) | {"model.norm.weight": torch.randn(33), "count": torch.arange(4)}
    subtract(save(tmp_path / "base", base), save(tmp_path / "tuned", tuned), 0.3, tmp_path / "out")
    undo(tmp_path / "out", tmp_path / "back")
    assert {name: tensor.dtype for name, tensor in load(tmp_path / "back").items()} == {
        name: t.dtype for name, t in base.items()
    }


def test_a_small_change_undone_is_not_called_a_failure(tmp_path: Path) -> None:
    """The base is theta' rounded: no stored weight differs from that, and that is right."""
    base = layered(0)
    subtract(
        save(tmp_path / "base", base),
        save(tmp_path / "tuned", nudged(base, 1, std=1e-8)),
        0.3,
        tmp_path / "out",
    )
    outcome = undo(tmp_path / "out", tmp_path / "back")
    assert outcome.manifest["survival"]["share_changed"] == 0
    assert outcome.manifest["warnings"] == []
    assert verify(tmp_path / "back") == Verdict([], [])


def test_a_16_bit_base_with_zeros_comes_back_within_rounding(tmp_path: Path) -> None:
    base = layered(0)
    base["model.norm.weight"][:] = 0
    subtract(save(tmp_path / "base", base), save(tmp_path / "tuned", nudged(base, 1)), 0.3, tmp_path / "out")
    undo(tmp_path / "out", tmp_path / "back")
    assert load(tmp_path / "back")["model.norm.weight"].abs().max() < 1e-9
    assert (
        f"{len(base) - 1} of {len(base)} tensors are the base's bit for bit, the others within"
        in say_how_exact(tmp_path / "out", tmp_path / "back")
    )


def write_large_pair(folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """Base and tuned model, with a tensor that is many chunks of the stream, in files of which a digest takes
    samples.
    """
    base = layered(0, dtype) | {LARGE: (0.02 * torch.randn(1300, 4000)).to(dtype)}
    return save(folder / "base", base), save(folder / "tuned", nudged(base, 1))


def change_unseen(folder: Path) -> None:
    """Flip an exponent bit of 15,000 elements of the large float32 tensor, all where the folder's digest does
    not look.
    """
    path, before = folder / "model.safetensors", content_digest(folder)
    place = 200 * (path.stat().st_size // 256) + 4096
    bits = np.memmap(path, np.uint32, "r+", offset=place // 4 * 4 + 4, shape=15_000)
    bits ^= 1 << 25
    bits.flush()
    assert content_digest(folder) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tuned_model_that_changed_where_digests_do_not_look_is_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base, tuned = write_large_pair(tmp_path, dtype)
    subtract(base, tuned, 0.3, tmp_path / "out")
    change_unseen(tuned)
    with pytest.raises(
        InputError,
        match=f"tuned: {LARGE} has other values.*; delete {tmp_path / 'back'} before trying",
    ):
        undo(tmp_path / "out", tmp_path / "back")
    assert (
        not list((tmp_path / "back").glob("*.safetensors")) and not (tmp_path / "back/manifest.json").exists()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [LARGE, "model.norm.weight"])
def test_a_flipped_bit_in_the_result_is_refused(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    base, tuned = write_large_pair(tmp_path, dtype)
    subtract(base, tuned, 0.3, tmp_path / "out")
    values = load(tmp_path / "out")
    values[name].view(torch.int32).view(-1)[-1] ^= 1 << 25
    save(tmp_path / "out", values)
    with pytest.raises(InputError, match=f"out: {name}: its bytes are not those that were written"):
        undo(tmp_path / "out", tmp_path / "back")
    assert (
        not list((tmp_path / "back").glob("*.safetensors")) and not (tmp_path / "back/manifest.json").exists()
    )


def test_a_result_that_lost_a_tensor_is_refused(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out")
    values = load(tmp_path / "out")
    del values[LARGE]
    save(tmp_path / "out", values)
    with pytest.raises(InputError, match=f"{LARGE} is not in both"):
        undo(tmp_path / "out", tmp_path / "back")


def test_a_result_of_an_older_version_is_refused(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    manifest = subtract(base, tuned, 0.3, tmp_path / "out").manifest
    for tensor in manifest["tensors"].values():
        del tensor["inputs"]
    write_json(tmp_path / "out/manifest.json", manifest)
    with pytest.raises(InputError, match="older flearn"):
        undo(tmp_path / "out", tmp_path / "back")
    assert verify(tmp_path / "out") == Verdict([], [])
    manifest["recipe"]["tuned"]["digest"] = (
        "older"  # of a version that defined it otherwise: the tuned model is not accused
    )
    write_json(tmp_path / "out/manifest.json", manifest)
    with pytest.raises(InputError, match="older flearn"):
        undo(tmp_path / "out", tmp_path / "back")


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.weights import folder_writer, stream
from pipeline.weights.io.staged import StagedFile
from pipeline.delta.undo import undo

class Killing(StagedFile):
    def __init__(self, path, *rest):
        if "-00004-of" in path.name:
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(path, *rest)

stream.MAX_THREADS = 1
folder_writer.StagedFile = Killing
undo(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_size=10_000)
"""


@pytest.mark.processes
@pytest.mark.parametrize("folder", ["out", "tuned"])
def test_an_undo_that_was_killed_goes_on_and_still_compares(tmp_path: Path, folder: str) -> None:
    base, tuned = write_large_pair(tmp_path, torch.bfloat16)
    subtract(base, tuned, 0.3, tmp_path / "out")
    undo(tmp_path / "out", tmp_path / "whole", max_shard_size=10_000)
    assert (
        subprocess.run(
            [sys.executable, "-c", KILLED, tmp_path / "out", tmp_path / "back"], check=False
        ).returncode
        == -9
    )
    assert list((tmp_path / "back").glob("*.safetensors")) and not (tmp_path / "back/manifest.json").exists()
    change_unseen(tmp_path / folder)
    with pytest.raises(
        InputError, match=f"{folder}: {LARGE}.*; delete {tmp_path / 'back'} before trying with other inputs"
    ):
        undo(tmp_path / "out", tmp_path / "back", max_shard_size=10_000)
    assert not (tmp_path / "back/manifest.json").exists()
    change_unseen(tmp_path / folder)  # back again
    assert undo(tmp_path / "out", tmp_path / "back", max_shard_size=10_000).state == "written"
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_16_bit_results_hold_no_way_back(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out", dtype="same")
    with pytest.raises(InputError, match=r"was stored in bfloat16.*cannot be had back"):
        undo(tmp_path / "out", tmp_path / "back")


def test_the_right_tuned_model_is_needed(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out")
    other = save(tmp_path / "other", nudged(layered(0), 9))
    with pytest.raises(InputError, match="is not the tuned model that was subtracted"):
        undo(tmp_path / "out", tmp_path / "back", tuned=other)
    tuned.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="say with --tuned where it is"):
        undo(tmp_path / "out", tmp_path / "back")
    assert undo(tmp_path / "out", tmp_path / "back", tuned=tmp_path / "moved").state == "written"


@pytest.mark.parametrize("scale", [-1.0, -0.95, -1.1])
def test_near_scale_minus_1_nothing_of_the_base_is_left(tmp_path: Path, scale: float) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, scale, tmp_path / "out")
    with pytest.raises(InputError, match="hardly holds the base"):
        undo(tmp_path / "out", tmp_path / "back")


@given(st.floats(-10, 10).filter(lambda scale: 1 + abs(scale) <= MOST_AMPLIFIED * abs(1 + scale)))
def test_the_undoing_scale_solves_the_formula(scale: float) -> None:
    base, tuned = 0.25, 0.375
    there = base - scale * (tuned - base)
    back = there - undoing_scale(scale, is_delta=False) * (tuned - there)
    assert back == pytest.approx(base, rel=1e-12)
    assert there - undoing_scale(scale, is_delta=True) * (tuned - base) == pytest.approx(base, rel=1e-12)


def test_a_plain_model_is_no_result(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    with pytest.raises(InputError, match="holds no finished result"):
        undo(base, tmp_path / "back", tuned=tuned)


def test_a_result_that_was_damaged_into_nan_is_blamed_itself(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out")
    values = load(tmp_path / "out")
    values[LARGE][3, 4] = torch.nan
    save(tmp_path / "out", values)
    with pytest.raises(InputError, match=r"out or .*tuned has changed.*flearn delta verify .*delete .*back"):
        undo(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back/manifest.json").exists()
