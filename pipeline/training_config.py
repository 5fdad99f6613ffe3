"""The config's sections of fine-tuning, told apart by `kind`: one class a kind of `pipeline/methods.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from pipeline.methods import Kind
from pipeline.settings import PLACEMENT, Section


class Training(Section):
    """What every kind of fine-tuning has.

    The arithmetic depends on `batch_size`, not on ranks or `micro_batch_size` (LoRA's dropout apart).
    """

    kind: Kind
    """Tells the kinds apart. A section of the config has its kind by its place, and need not name it."""
    epochs: int = Field(3, gt=0)
    lr: float = Field(5e-5, gt=0)
    batch_size: int = Field(64, gt=0)
    """Records per optimizer step, over all ranks and accumulation steps together."""
    micro_batch_size: int = Field(4, gt=0, json_schema_extra=PLACEMENT)
    """Records per forward pass of one rank."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Weights and activations of the forward pass; masters and moments are always fp32."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient clipping; 0 switches it off."""
    max_length: int = Field(512, gt=1)
    """Longest prompt + answer in tokens; a longer record is an error, never cut in silence."""
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 2}})
    """A DeepSpeed config, or the path of its JSON file; "auto" values are filled in."""
    gradient_checkpointing: bool = Field(False, json_schema_extra=PLACEMENT)
    checkpoint_every_steps: int = Field(200, gt=0, json_schema_extra=PLACEMENT)
    """Optimizer steps between two checkpoints to resume from."""

    def recipe(self) -> dict[str, Any]:
        """As for any section; of the DeepSpeed config, what decides the result."""
        recipe = super().recipe()
        config = {key: value for key, value in self.deepspeed.items() if key not in _DEEPSPEED_PLACEMENT}
        zero = config.get("zero_optimization", {})
        kept = {key: value for key, value in zero.items() if key not in _ZERO_PLACEMENT}
        return recipe | {"deepspeed": config | {"zero_optimization": kept}}


# Settings of DeepSpeed that say how to run, or what to print, and nothing of what comes out.
_DEEPSPEED_PLACEMENT = {
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
}
_ZERO_PLACEMENT = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
}


class FullTraining(Training):
    """Fine-tuning of all parameters."""

    kind: Literal["full"] = "full"


class LoraTraining(Training):
    """Fine-tuning of a LoRA adapter (PEFT)."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(8, gt=0)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | None = None
    """Names of linear modules; None: the attention's query and value projections, as in the paper."""


class Teach(FullTraining):
    """Makes the original model: full fine-tuning on the old facts, so that there is something to forget."""

    facts: Literal["old", "old_and_locality"] = "old"
    """`old_and_locality` also teaches the unrelated questions, for a model that knows nothing yet."""

    @property
    def training(self) -> FullTraining:
        """The fine-tuning itself, without what it is on."""
        return FullTraining.model_validate(self.model_dump(exclude={"facts"}))


_TRAINING: TypeAdapter[FullTraining | LoraTraining] = TypeAdapter(
    Annotated[FullTraining | LoraTraining, Field(discriminator="kind")]
)


def read_training(values: dict[str, Any]) -> FullTraining | LoraTraining:
    """The training that a step's section holds, by its `kind`."""
    return _TRAINING.validate_python(values)
