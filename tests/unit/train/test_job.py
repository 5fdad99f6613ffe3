"""A stage's section becomes the right job: full or LoRA, and which result it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact, write_json
from pipeline.config import LoraTraining, Prompt, Teach, Training
from pipeline.context import Context
from pipeline.facts.fact import Fact, write_facts
from pipeline.train.job import Job, plan_job

FACTS = [Fact(str(i), f"What is number {i}?", "x", [f"old {i}"], f"new {i}") for i in range(7)]


@pytest.fixture
def plan(tiny_model: Any, tmp_path: Path) -> Any:
    def artifact(name: str, stage: str, **facts: Any) -> Artifact:
        write_json(tmp_path / name / "manifest.json", {"stage": stage, "inputs": {}, "facts": facts})
        return Artifact(tmp_path / name)

    def make(training: Training, target: str = "new", stage: str = "model") -> Job:
        facts = artifact("facts", "facts")
        write_facts(facts.folder / "facts.jsonl", FACTS)
        model = artifact(stage, stage, model=str(tiny_model("llama")), model_kind="folder")
        section = {"training": training.model_dump(mode="json"), "prompt": Prompt().model_dump(mode="json"), "target": target, "seed": 3}
        return plan_job(section, {"model": model, "facts": facts}, Context())

    return make


def test_the_result_that_each_stage_leaves(plan: Any) -> None:
    assert plan(Training(), "old").keeps_checkpoint, "FT-old's ZeRO checkpoint is subtracted in place"
    assert not plan(Teach(facts="old"), "old").keeps_checkpoint, "what is taught is a model to start from"
    assert not plan(Training(), "new").keeps_checkpoint
    assert not plan(LoraTraining(), "old").keeps_checkpoint


def test_full_and_lora(plan: Any) -> None:
    full, lora = plan(Training(batch_size=4, epochs=2)), plan(LoraTraining(rank=2))
    assert full.adapter is None and full.num_trained == full.num_parameters
    assert lora.adapter.r == 2
    assert lora.num_trained == 2 * 2 * 2 * (32 + 32)  # layers, projections, rank, in + out
    assert lora.num_parameters == full.num_parameters + lora.num_trained
    assert full.described()["num_steps"] == 4 and full.described()["num_records"] == 7
    assert full.described()["batch"] == {"global": 4, "micro": 4, "accumulation": 1, "ranks": 1}


def test_disk_is_two_checkpoints_only_where_there_are_several(plan: Any) -> None:
    once = plan(Training(batch_size=4, epochs=2, precision="bf16"))
    often = plan(Training(batch_size=4, epochs=2, precision="bf16", checkpoint_every_steps=1))
    assert once.disk_bytes(0) == once.num_parameters * (14 + 4)
    assert often.disk_bytes(0) == once.num_parameters * (2 * 14 + 4)
    assert often.disk_bytes(1) == once.num_parameters * (14 + 4)
    assert plan(Training(precision="fp32"), "old").disk_bytes(0) == once.num_parameters * 16


def test_lora_in_bf16_on_a_forgotten_model_warns(plan: Any) -> None:
    assert any("rounded to bf16" in text for text in plan(LoraTraining(), stage="forget").warnings)
    assert not plan(LoraTraining(precision="fp32"), stage="forget").warnings
    assert not plan(Training(), stage="forget").warnings
