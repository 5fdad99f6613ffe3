"""One fine-tuning, planned: its base, course, DeepSpeed config and adapter, and how much disk it needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact
from pipeline.config import Prompt
from pipeline.context import Context
from pipeline.errors import InputError
from pipeline.facts.fact import read_facts
from pipeline.facts.prompts import Prompter
from pipeline.models.load import load_tokenizer
from pipeline.train import checkpoint
from pipeline.train.course import Course, training_records
from pipeline.train.deepspeed_config import MONITOR_PACKAGES, Ready, make_ready
from pipeline.train.lora import add_adapter, lora_config
from pipeline.train.model import architecture, num_positions, skeleton
from pipeline.training_config import LoraTraining, Training, read_training

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class Job:
    """What a train stage is about to do; the same on every rank."""

    base: Artifact
    """Whose weights training starts from."""
    course: Course
    ready: Ready
    adapter: LoraConfig | None
    """LoRA's config; None for full training."""
    keeps_checkpoint: bool
    """Whether the last ZeRO checkpoint is itself the result (full training of the old answers: FT-old)."""
    num_parameters: int
    num_trained: int
    warnings: list[str]

    @property
    def training(self) -> Training:
        """The settings; they lie in the course."""
        return self.course.training

    @property
    def folder(self) -> Path:
        """The Hugging Face folder with the model's config and tokenizer."""
        return self.base.model_folder

    @cached_property
    def engine_settings(self) -> tuple[object, ...]:
        """All that is built into the model and its engine, to be compared; the rest comes with the course."""
        built_in = {
            "kind",
            "precision",
            "gradient_checkpointing",
            "rank",
            "alpha",
            "dropout",
            "target_modules",
        }
        training = self.training.model_dump(include=built_in)
        return architecture(self.folder), training, self.ready.config, self.ready.adam

    def disk_bytes(self, num_saved: int) -> int:
        """Bytes still to be written while old ones remain, given `num_saved` complete checkpoints.

        An old checkpoint goes when the new one is complete. The last one has no moments, and so leaves room
        for the result (fp32 weights).
        """
        num_copies = 1 if self.course.num_steps <= self.training.checkpoint_every_steps else 2
        one = checkpoint.num_bytes(self.num_trained, self.training.precision, self.ready.zero_stage)
        return one * max(1, num_copies - num_saved)

    def described(self) -> dict[str, Any]:
        """The part of the stage's result that is known beforehand."""
        split = self.course.split
        return {
            "num_steps": self.course.num_steps,
            "num_records": len(self.course.records),
            "zero_stage": self.ready.zero_stage,
            "batch": {
                "global": split.global_size,
                "micro": split.micro_size,
                "accumulation": split.accumulation,
                "ranks": split.ranks,
            },
            "num_parameters": self.num_parameters,
            "num_trainable": self.num_trained,
            "precision": self.training.precision,
            "warnings": self.warnings,
        }


def plan_job(section: dict[str, Any], inputs: dict[str, Artifact], context: Context) -> Job:
    """The job that a stage's section and inputs ask for.

    Raises InputError for settings and records that cannot work.
    """
    training = read_training(section["training"])
    base = inputs["model"]
    model: Any = skeleton(base.model_folder)
    adapter = lora_config(model, training) if isinstance(training, LoraTraining) else None
    if adapter is not None:
        model = add_adapter(model, adapter)
    ready = make_ready(training, context.world_size, model.config.get_text_config().hidden_size)
    _require_monitors(ready)
    prompter = Prompter(load_tokenizer(base), Prompt.model_validate(section["prompt"]))
    facts = read_facts(inputs["facts"].folder / "facts.jsonl")
    records = training_records(
        facts, section["target"], prompter, training.max_length, num_positions(model.config)
    )
    return Job(
        base=base,
        course=Course(records, training, section["seed"], context.world_size),
        ready=ready,
        adapter=adapter,
        keeps_checkpoint=section["keeps_checkpoint"],
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        warnings=ready.warnings + _warnings(base, training, adapter),
    )


def _require_monitors(ready: Ready) -> None:
    """Not when planning: the jobs may run in a container that has what is missing here."""
    for name, package in MONITOR_PACKAGES.items():
        is_on = ready.config.get(name, {}).get("enabled")
        if is_on and package is not None and find_spec(package) is None:
            raise InputError(
                f"deepspeed.{name}.enabled: the package is missing; pip install {package}, or set it to false"
            )


def _warnings(base: Artifact, training: Training, adapter: LoraConfig | None) -> list[str]:
    if adapter is not None and training.precision == "bf16" and "survival" in base.result:
        return [
            "LoRA in bf16 learns on the forgotten model rounded to bf16, which may undo part of a small"
            " subtraction (see survival)"
        ]
    return []
