"""Subtraction straight from ZeRO partitions and adapters, against the formula computed in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from delta_models import Tensors, formula, layered, load, nudged, save, write_adapter
from zero_checkpoint import Checkpoint

from pipeline.artifact import Artifact, write_json
from pipeline.config import Forget
from pipeline.context import Context
from pipeline.delta import stage as forget_stage
from pipeline.delta.subtract import subtract
from pipeline.delta.undo import undo
from pipeline.delta.verify import Verdict, verify
from pipeline.errors import InputError
from pipeline.weights import slices, stream
from pipeline.weights.io import direct
from pipeline.weights.io.direct import PAGE

FROZEN = ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that chunks end inside partitions, and partitions inside chunks, and both are read directly."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", 2 * PAGE)
    monkeypatch.setattr(slices, "_SMALL_EXTENT_BYTES", 64)
    monkeypatch.setattr(direct, "_LARGE_FILE_BYTES", 0)


def assert_equal(one: Tensors, two: Tensors) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


def checkpoint(
    tuned: Tensors,
    stage: int,
    world_size: int,
    frozen: tuple[str, ...] = (),
    aliases: dict[str, str] | None = None,
) -> Checkpoint:
    trained = {name: values for name, values in tuned.items() if name not in frozen}
    names = list(trained)
    groups = [{name: trained[name] for name in names[:5]}, {name: trained[name] for name in names[5:]}]
    return Checkpoint(
        stage, world_size, groups, frozen={name: tuned[name] for name in frozen}, aliases=aliases or {}
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_from_zero_partitions(tmp_path: Path, stage: int, world_size: int) -> None:
    base = layered(0)
    tuned = nudged(base, 1)
    folder = checkpoint(tuned, stage, world_size).write(tmp_path / "checkpoints")
    save(tmp_path / "base", base)
    subtract(tmp_path / "base", folder, 0.3, tmp_path / "out")
    assert_equal(load(tmp_path / "out"), formula(base, tuned, 0.3))
    assert verify(tmp_path / "out") == Verdict([], [])


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frozen_and_tied_parameters(tmp_path: Path, stage: int, dtype: torch.dtype) -> None:
    base = layered(0, dtype)
    del base["lm_head.weight"]
    tuned = nudged(base, 1) | {name: base[name] for name in FROZEN}
    aliases = {"lm_head.weight": "model.embed_tokens.weight"}
    folder = checkpoint(tuned, stage, 2, FROZEN, aliases).write(tmp_path / "checkpoints")
    save(tmp_path / "base", base)
    manifest = subtract(tmp_path / "base", folder, 0.3, tmp_path / "out").manifest
    assert_equal(load(tmp_path / "out"), formula(base, tuned, 0.3))
    assert manifest["tensors"][FROZEN[0]]["survival"]["delta_norm"] == 0


def test_a_hub_file_without_the_models_prefix(tmp_path: Path) -> None:
    """GPT-2: the hub says h.0.attn..., the running model transformer.h.0.attn..."""
    base = {
        name.removeprefix("model."): values for name, values in layered(0).items() if name != "lm_head.weight"
    }
    tuned = nudged(base, 1)
    folder = checkpoint({f"model.{name}": values for name, values in tuned.items()}, 2, 2).write(
        tmp_path / "checkpoints"
    )
    save(tmp_path / "base", base)
    subtract(tmp_path / "base", folder, 0.3, tmp_path / "out")
    assert_equal(load(tmp_path / "out"), formula(base, tuned, 0.3))


@pytest.mark.parametrize("stage", [2, 3])
def test_the_way_back_from_zero(tmp_path: Path, stage: int) -> None:
    base = layered(0)
    folder = checkpoint(nudged(base, 1), stage, 3).write(tmp_path / "checkpoints")
    save(tmp_path / "base", base)
    subtract(tmp_path / "base", folder, 0.3, tmp_path / "out")
    undo(tmp_path / "out", tmp_path / "back")
    assert_equal(load(tmp_path / "back"), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapters_change_is_subtracted_and_the_rest_copied(tmp_path: Path, dtype: torch.dtype) -> None:
    base = layered(0, dtype)
    save(tmp_path / "base", base)
    changes = write_adapter(tmp_path / "adapter")
    manifest = subtract(tmp_path / "base", tmp_path / "adapter", 0.7, tmp_path / "out").manifest
    scale = torch.tensor(0.7)
    right = {
        name: values.float() - (scale * changes[name].float() if name in changes else 0)
        for name, values in base.items()
    }
    assert_equal(load(tmp_path / "out"), right)
    assert {
        name for name, tensor in manifest["tensors"].items() if tensor["survival"] is not None
    } == changes.keys()
    assert manifest["survival"]["num_elements"] == 2 * 33 * 33
    assert verify(tmp_path / "out") == Verdict([], [])


def test_an_adapter_is_taken_back(tmp_path: Path) -> None:
    base = layered(0)
    save(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter")
    subtract(
        tmp_path / "base", tmp_path / "adapter", -1.0, tmp_path / "out"
    )  # an adapter has no scale that loses the base
    undo(tmp_path / "out", tmp_path / "back")
    assert_equal(load(tmp_path / "back"), base)


def test_what_is_held_of_the_factors_counts_in_the_memory(tmp_path: Path) -> None:
    save(
        tmp_path / "base",
        {f"model.layers.{layer}.self_attn.q_proj.weight": torch.zeros(1024, 1024) for layer in (0, 2)},
    )
    write_adapter(tmp_path / "adapter", rank=512, size=1024)
    with pytest.raises(InputError, match=r"--memory: .* need \d+MiB"):
        subtract(tmp_path / "base", tmp_path / "adapter", 0.3, tmp_path / "out", memory="16MiB")


@pytest.mark.parametrize("kind", ["zero", "adapter", "folder"])
def test_the_forget_stage(tmp_path: Path, kind: str) -> None:
    base = layered(0)
    tuned = nudged(base, 1)
    original, tuning = tmp_path / "teach-1", tmp_path / "tune_old-2"
    save(original / "model", base)
    (original / "model/config.json").write_text('{"model_type": "llama"}')
    tuning.mkdir()
    if kind == "zero":
        made = str(checkpoint(tuned, 2, 2).write(tuning / "checkpoints").relative_to(tuning))
    elif kind == "adapter":
        write_adapter(tuning / "adapter")
        made = "adapter"
    else:
        made = save(tuning / "model", tuned).name
    for folder, said in (
        (original, {"model": "model", "model_kind": "folder"}),
        (tuning, {"model": made, "model_kind": kind}),
    ):
        write_json(folder / "manifest.json", {"result": said, "inputs": {"model": original.name}})
    section = {"forget": Forget(scale=0.3).model_dump(mode="json"), "seed": 0}
    out = tmp_path / "forget-3"
    inputs = {"base": Artifact(original), "tuned": Artifact(tuning)}
    facts = forget_stage.run(section, inputs, out, Context())
    assert facts is not None
    json.dumps(facts)
    assert (facts["model"], facts["model_kind"], facts["scale"], facts["dtype"]) == (
        "model",
        "folder",
        0.3,
        "float32",
    )
    assert facts["survival"]["projection"] == pytest.approx(1, abs=1e-5)
    assert [row["layer"] for row in facts["layers"]] == ([0, 2] if kind == "adapter" else [0, 1, 2])
    assert json.loads((out / "model/config.json").read_text())["dtype"] == "float32"
    if kind != "adapter":
        assert_equal(load(out / "model"), formula(base, tuned, 0.3))
    assert forget_stage.run(section, inputs, out, Context()) == facts


def test_an_adapter_alone_is_no_base(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match="an adapter; the model that it was trained on"):
        subtract(tmp_path / "adapter", tmp_path / "adapter", 0.3, tmp_path / "out")


@pytest.mark.parametrize(("dtype", "value"), [("same", float("nan")), ("float16", 70000.0)])
def test_a_tensor_that_the_adapter_leaves_alone_must_be_finite_too(
    tmp_path: Path, dtype: str, value: float
) -> None:
    tensors = layered(0, torch.float32)
    tensors["model.norm.weight"][3] = value
    save(tmp_path / "base", tensors)
    write_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"model\.norm\.weight: NaN or infinity"):
        subtract(tmp_path / "base", tmp_path / "adapter", 0.7, tmp_path / "out", dtype=dtype)
