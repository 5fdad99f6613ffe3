from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delta_models import layered, save, write_pair
from zero_checkpoint import Checkpoint

from pipeline.delta.inspect import inspect, render
from pipeline.delta.subtract import subtract


def test_a_folder_is_described(tmp_path: Path) -> None:
    tensors = layered(0) | {"count": torch.arange(3), "nothing": torch.empty(0, 4)}
    found = inspect(save(tmp_path / "model", tensors))
    floats = sum(tensor.numel() for tensor in layered(0).values())
    assert found["kind"] == "safetensors"
    assert found["num_tensors"] == len(tensors)
    assert found["dtypes"] == {"bfloat16": floats, "int64": 3, "float32": 0}
    assert found["num_bytes"] == 2 * floats + 24
    assert found["empty"] == ["nothing"]
    assert {"name": "model.norm.weight", "shape": [33], "dtype": "bfloat16"} in found["tensors"]
    text = render(found)
    assert "EMPTY: nothing" in text
    assert "model.embed_tokens.weight" in text and "101x33" in text


def test_a_result_says_how_it_was_made(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert found["made_by"]["scale"] == 0.3
    assert found["made_by"]["tuned"]["path"] == str(tuned)
    assert "0.3" in render(found)
    assert "made_by" not in inspect(base)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_says_its_stage_and_ranks(tmp_path: Path, stage: int) -> None:
    found = inspect(Checkpoint(stage, 3, [layered(0, torch.float32)]).write(tmp_path))
    assert (found["kind"], found["stage"], found["world_size"], found["global_steps"]) == (
        f"zero-{stage}",
        stage,
        3,
        2,
    )
    assert f"zero-{stage}, stage {stage}, world size 3" in render(found)
