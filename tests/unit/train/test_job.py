"""A stage's section becomes the right job: full or LoRA, and which result it leaves."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact, write_json
from pipeline.config import Prompt
from pipeline.context import Context
from pipeline.errors import InputError
from pipeline.facts.fact import Fact, write_facts
from pipeline.train import stage
from pipeline.train.job import Job, plan_job
from pipeline.train.model import architecture
from pipeline.training_config import FullTraining, LoraTraining, Training

FACTS = [Fact(str(i), f"What is number {i}?", "x", [f"old {i}"], f"new {i}") for i in range(7)]


@pytest.fixture
def arguments(tiny_model: Any, tmp_path: Path) -> Any:
    def artifact(name: str, stage: str, **facts: Any) -> Artifact:
        write_json(tmp_path / name / "manifest.json", {"stage": stage, "inputs": {}, "result": facts})
        return Artifact(tmp_path / name)

    def make(
        training: Training,
        target: str = "new",
        keeps_checkpoint: bool = False,
        start: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Artifact]]:
        facts = artifact("facts", "facts")
        write_facts(facts.folder / "facts.jsonl", FACTS)
        model = artifact("model", "model", model=str(tiny_model("llama")), model_kind="folder", **start or {})
        section = {
            "training": training.model_dump(mode="json"),
            "prompt": Prompt().model_dump(mode="json"),
            "target": target,
            "keeps_checkpoint": keeps_checkpoint,
            "seed": 3,
        }
        return section, {"model": model, "facts": facts}

    return make


@pytest.fixture
def plan(arguments: Any) -> Any:
    def make(*args: Any, **settings: Any) -> Job:
        section, inputs = arguments(*args, **settings)
        return plan_job(section, inputs, Context())

    return make


def test_the_result_that_each_stage_leaves(plan: Any) -> None:
    assert plan(FullTraining(), "old", keeps_checkpoint=True).keeps_checkpoint, (
        "FT-old's is subtracted in place"
    )
    assert not plan(FullTraining(), "old").keeps_checkpoint, "what is taught is a model to start from"


def test_full_and_lora(plan: Any) -> None:
    full, lora = plan(FullTraining(batch_size=4, epochs=2)), plan(LoraTraining(rank=2))
    assert full.adapter is None and full.num_trained == full.num_parameters
    assert lora.adapter.r == 2
    assert lora.num_trained == 2 * 2 * 2 * (32 + 32)  # layers, projections, rank, in + out
    assert lora.num_parameters == full.num_parameters + lora.num_trained
    assert full.described()["num_steps"] == 4 and full.described()["num_records"] == 7
    assert full.described()["batch"] == {"global": 4, "micro": 4, "accumulation": 1, "ranks": 1}


def test_jobs_that_one_engine_serves(plan: Any, tiny_model: Any) -> None:
    one = plan(FullTraining(batch_size=4))
    assert plan(FullTraining(batch_size=4, lr=1.0, epochs=9, warmup_ratio=0.5), "old").engine_settings == (
        one.engine_settings
    )
    others: list[dict[str, Any]] = [
        {"batch_size": 5},
        {"precision": "fp32"},
        {"weight_decay": 0.1},
        {"max_grad_norm": 2.0},
        {"gradient_checkpointing": True},
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
    ]
    for other in others:
        assert plan(FullTraining(**{"batch_size": 4} | other)).engine_settings != one.engine_settings, other
    lora = plan(LoraTraining(batch_size=4))
    assert lora.engine_settings not in (
        one.engine_settings,
        plan(LoraTraining(batch_size=4, rank=2)).engine_settings,
    )


def test_the_same_model_in_another_folder_is_the_same_model(tiny_model: Any) -> None:
    assert tiny_model("llama") != tiny_model("llama", seed=1)
    assert architecture(tiny_model("llama")) == architecture(tiny_model("llama", seed=1))
    assert architecture(tiny_model("llama")) != architecture(tiny_model("llama", num_layers=3))
    assert architecture(tiny_model("llama")) != architecture(tiny_model("gpt2"))


def test_disk_is_two_checkpoints_only_where_there_are_several(plan: Any) -> None:
    once = plan(FullTraining(batch_size=4, epochs=2, precision="bf16"))
    often = plan(FullTraining(batch_size=4, epochs=2, precision="bf16", checkpoint_every_steps=1))
    assert once.disk_bytes(0) == once.num_parameters * 14
    assert often.disk_bytes(0) == once.num_parameters * 2 * 14
    assert often.disk_bytes(1) == once.num_parameters * 14
    assert plan(FullTraining(precision="fp32"), "old").disk_bytes(0) == once.num_parameters * 16


def test_too_little_disk_is_said_before_anything_is_done(
    arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    out = tmp_path / "out"
    out.mkdir()
    section, inputs = arguments(FullTraining())
    with pytest.raises(InputError, match=r"checkpoints and result need .* GB, 0\.00 GB are free"):
        stage.run(section, inputs, out, Context())
    assert not any(out.iterdir())


def test_lora_in_bf16_on_a_forgotten_model_warns(plan: Any) -> None:
    assert any("rounded to bf16" in text for text in plan(LoraTraining(), start={"survival": {}}).warnings)
    assert not plan(LoraTraining(precision="fp32"), start={"survival": {}}).warnings
    assert not plan(FullTraining(), start={"survival": {}}).warnings


def test_a_monitor_whose_package_is_missing(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"zero_optimization": {"stage": 2}, "wandb": {"enabled": True}}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"deepspeed\.wandb\.enabled: .*pip install wandb"):
        plan(FullTraining(deepspeed=config))
    assert plan(FullTraining(deepspeed=config | {"wandb": {"enabled": False}})).ready.config["wandb"] == {
        "enabled": False
    }
