"""What to change where a stage's memory does not suffice: the first of a few changes of settings with which
it would.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from launch.doctor import estimate
from launch.doctor.capacity import Capacity, fits
from launch.doctor.estimate import Data, Shape
from pipeline.config import Cluster, Evaluate, LoraTraining, Training
from pipeline.plan import Step

_MOST_RANKS = 64
_SMALL_BATCH = 4


def training_remedy(
    step: Step, shape: Shape, training: Training, cluster: Cluster, data: Data, capacity: Capacity
) -> str:
    """The change that makes a fine-tuning fit, as `--set` options: memory saved at the cost of time, else
    ZeRO-3, else more GPUs.
    """
    section = "lora" if isinstance(training, LoraTraining) else "teach" if step.stage == "teach" else "full"
    more = _more_ranks(cluster, capacity) if capacity.device_bytes is not None or capacity.on_cluster else []
    for tried in (cluster, *_fewer_ranks(cluster, capacity), *more):
        for changed, options in _changes(training, section):
            needed = estimate.training_memory(shape, changed, tried.ranks, data.record_tokens).total
            if fits(needed, capacity.limit(tried)):
                return _advice(options + _cluster_options(tried, cluster), tried.ranks, capacity)
    return "no setting makes it fit here: more or larger GPUs, a smaller model, or LoRA alone"


def _fewer_ranks(cluster: Cluster, capacity: Capacity) -> Iterator[Cluster]:
    """Where ranks share the host's memory, fewer have more of it each."""
    ranks = cluster.ranks // cluster.nodes if capacity.own_bytes is None else 1
    while ranks > 1:
        ranks //= 2
        yield cluster.model_copy(update={"ranks": ranks * cluster.nodes})


def _more_ranks(cluster: Cluster, capacity: Capacity) -> Iterator[Cluster]:
    """On a cluster on as many more nodes: a node may have no more GPUs than the ranks that it has."""
    factor = 2
    while cluster.ranks * factor <= _MOST_RANKS:
        nodes = cluster.nodes * factor if capacity.on_cluster or cluster.nodes > 1 else 1
        yield cluster.model_copy(update={"ranks": cluster.ranks * factor, "nodes": nodes})
        factor *= 2


def _cluster_options(tried: Cluster, cluster: Cluster) -> list[str]:
    return [
        f"cluster.{name}={getattr(tried, name)}"
        for name in ("ranks", "nodes")
        if getattr(tried, name) != getattr(cluster, name)
    ]


def _advice(options: list[str], ranks: int, capacity: Capacity) -> str:
    settings = " ".join(f"--set {option}" for option in options)
    if capacity.num_gpus is not None and ranks > capacity.num_gpus:
        return f"would fit on {ranks} GPUs ({capacity.num_gpus} here), with {settings}"
    return f"would fit with {settings}"


def _changes(training: Training, section: str) -> Iterator[tuple[Training, list[str]]]:
    saving = {"gradient_checkpointing": True, "micro_batch_size": 1}
    save_options = [f"{section}.gradient_checkpointing=true", f"{section}.micro_batch_size=1"]
    zero3 = {
        "deepspeed": training.deepspeed
        | {"zero_optimization": training.deepspeed["zero_optimization"] | {"stage": 3}}
    }
    zero3_options = [f"{section}.deepspeed.zero_optimization.stage=3"]
    yield training, []
    yield training.model_copy(update=saving), save_options
    yield training.model_copy(update=zero3), zero3_options
    yield training.model_copy(update=saving | zero3), [*save_options, *zero3_options]


def evaluation_remedy(
    shape: Shape, settings: Evaluate, cluster: Cluster, data: Data, capacity: Capacity
) -> str:
    """The change that makes an evaluation fit, as `--set` options: a smaller batch, else fewer ranks on a
    host, else bf16.
    """
    precisions = dict.fromkeys([settings.precision, "bf16"])
    sizes = dict.fromkeys([settings.batch_size, min(_SMALL_BATCH, settings.batch_size)])
    for precision, tried, size in product(precisions, [cluster, *_fewer_ranks(cluster, capacity)], sizes):
        changes = {"batch_size": size, "precision": precision}
        needed = sum(
            estimate.evaluation_memory(shape, settings.model_copy(update=changes), data.record_tokens)
        )
        if fits(needed, capacity.limit(tried)):
            options = [
                f"evaluate.{name}={value}"
                for name, value in changes.items()
                if value != getattr(settings, name)
            ]
            warning = " (bf16 rounds a small subtraction away)" if precision != settings.precision else ""
            return _advice(options + _cluster_options(tried, cluster), 1, capacity) + warning
    return "no setting makes it fit here: a GPU with more memory, or a smaller model"
