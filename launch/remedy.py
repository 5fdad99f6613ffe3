"""What to change where a stage's memory does not suffice: the first of a few changes of settings with which it would."""

from __future__ import annotations

from collections.abc import Iterator

from launch import estimate
from launch.capacity import Capacity, fits
from launch.estimate import Data, Shape
from pipeline.config import Cluster, Evaluate, LoraTraining, Training
from pipeline.stages import Step

_RANKS_TRIED = (2, 4, 8, 16, 32, 64)


def training_remedy(step: Step, shape: Shape, training: Training, cluster: Cluster, data: Data, capacity: Capacity) -> str:
    """The change that makes a fine-tuning fit, as `--set` options: memory saved at the cost of time, else ZeRO-3, else more GPUs."""
    section = "lora" if isinstance(training, LoraTraining) else "teach" if step.stage == "teach" else "full"
    for ranks in _ranks_tried(cluster, capacity):
        for changed, options in _changes(training, section):
            needed = estimate.training_memory(shape, changed, ranks, data.record_tokens).total
            if fits(needed, capacity.limit(cluster, ranks)):
                options += [f"cluster.ranks={ranks}"] if ranks != cluster.ranks else []
                return f"would fit with {' '.join(f'--set {option}' for option in options)}"
    return "no setting makes it fit here: more or larger GPUs, a smaller model, or LoRA alone"


def _ranks_tried(cluster: Cluster, capacity: Capacity) -> list[int]:
    """More ranks are more GPUs; where they share the host's memory, fewer ranks have more of it each."""
    tried = [ranks for ranks in _RANKS_TRIED if ranks > cluster.ranks]
    if capacity.device_bytes is None:
        tried = [ranks for ranks in (*reversed(_RANKS_TRIED), 1) if ranks < cluster.ranks]
    return [cluster.ranks, *(ranks for ranks in tried if ranks % cluster.nodes == 0)]


def _changes(training: Training, section: str) -> Iterator[tuple[Training, list[str]]]:
    saving = {"gradient_checkpointing": True, "micro_batch_size": 1}
    save_options = [f"{section}.gradient_checkpointing=true", f"{section}.micro_batch_size=1"]
    zero3 = {"deepspeed": training.deepspeed | {"zero_optimization": training.deepspeed["zero_optimization"] | {"stage": 3}}}
    zero3_options = [f"{section}.deepspeed.zero_optimization.stage=3"]
    yield training, []
    yield training.model_copy(update=saving), save_options
    yield training.model_copy(update=zero3), zero3_options
    yield training.model_copy(update=saving | zero3), [*save_options, *zero3_options]


def evaluation_remedy(shape: Shape, settings: Evaluate, cluster: Cluster, data: Data, capacity: Capacity) -> str:
    """The change that makes an evaluation fit, as `--set` options."""
    for change, warning in (({"batch_size": 4}, ""), ({"batch_size": 4, "precision": "bf16"}, " (bf16 rounds a small subtraction away)")):
        needed = sum(estimate.evaluation_memory(shape, settings.model_copy(update=change), data.record_tokens))
        if fits(needed, capacity.limit(cluster)):
            return f"would fit with {' '.join(f'--set evaluate.{name}={value}' for name, value in change.items())}{warning}"
    return "no setting makes it fit here: a GPU with more memory, or a smaller model"
