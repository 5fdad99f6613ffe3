"""A user's DeepSpeed JSON made ready: "auto" filled from the experiment, contradictions refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any

from pipeline.config import Training
from pipeline.errors import InputError
from pipeline.train.batches import Shape
from pipeline.train.deepspeed_keys import keep_allowed


@dataclass(frozen=True)
class Adam:
    """AdamW's settings beside the learning rate and the weight decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class Ready:
    """A config that DeepSpeed takes as it is, without optimizer and scheduler (those are ours), and what came
    out of them.
    """

    config: dict[str, Any]
    adam: Adam
    warnings: list[str] = field(default_factory=list)

    @property
    def zero_stage(self) -> int:
        return self.config["zero_optimization"]["stage"]


def make_ready(training: Training, shape: Shape, hidden_size: int) -> Ready:
    """`training.deepspeed`, filled in. `hidden_size` decides ZeRO-3's "auto" bucket sizes, as in
    transformers.

    Raises InputError naming the DeepSpeed key.
    """
    config = keep_allowed(copy.deepcopy(training.deepspeed))
    _require_stage(config)
    adam = _take_optimizer(config, training)
    warnings = list(_drop_unused(config))
    _settle_batch(config, training, shape)
    _settle(config, "gradient_clipping", training.max_grad_norm, "max_grad_norm")
    _settle(config, "bf16.enabled", training.precision == "bf16", "precision")
    _fill_buckets(config["zero_optimization"], hidden_size)
    config["zero_allow_untested_optimizer"] = True
    for key, value in _walk(config):
        if value == "auto":
            raise InputError(f'deepspeed.{key}: there is nothing to fill "auto" from; give a value')
    return Ready(config, adam, warnings)


def _require_stage(config: dict[str, Any]) -> None:
    stage = _get(config, "zero_optimization.stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise InputError(
            f"deepspeed.zero_optimization.stage: 1, 2 or 3 is needed, not {stage} (stage 1 computes what stage 0 would)"
        )


def _drop_unused(config: dict[str, Any]) -> Iterator[str]:
    """Take out what is decided elsewhere; warnings for those who thought it would be used."""
    if config.pop("scheduler", None) is not None:
        yield "deepspeed.scheduler is not used: schedule and warmup_ratio decide the learning rate"
    section = config.pop("activation_checkpointing", {})
    if not isinstance(section, dict):
        raise InputError(f"deepspeed.activation_checkpointing: expected an object, not {section!r}")
    if any(section.values()):
        yield "deepspeed.activation_checkpointing is not used: gradient_checkpointing decides what is kept for the backward pass"


def _take_optimizer(config: dict[str, Any], training: Training) -> Adam:
    """Remove the optimizer's section and keep what it says. We build torch's AdamW ourselves: DeepSpeed's
    need a compiler.
    """
    section = config.pop("optimizer", {})
    if isinstance(section, dict):  # null says nothing
        section = {"type": "AdamW", "params": {}} | {
            name: value for name, value in section.items() if value is not None
        }
    if not isinstance(section, dict) or not isinstance(section["params"], dict):
        raise InputError(f"deepspeed.optimizer: expected an object with type and params, not {section!r}")
    kind, settings = (
        str(section["type"]),
        {name: value for name, value in section["params"].items() if value is not None},
    )
    if kind.lower() not in ("adam", "adamw") or not settings.pop("adam_w_mode", True):
        raise InputError(f"deepspeed.optimizer.type: AdamW is what is supported, not {kind}")
    for name in ("lr", "weight_decay"):
        given = settings.pop(name, None)
        if not _agrees(given, getattr(training, name)):
            raise InputError(
                f'deepspeed.optimizer.params.{name}: {given!r} contradicts {name} = {getattr(training, name)}; write "auto"'
            )
    for name in ("torch_adam", "fused"):  # how it is computed: decided by the device
        settings.pop(name, None)
    for name, default in (("amsgrad", False), ("bias_correction", True)):
        if settings.get(name) == default:
            del settings[name]
    chosen = {name: settings.pop(name) for name in ("betas", "eps") if name in settings}
    if settings:
        raise InputError(
            f"deepspeed.optimizer.params: no such setting of AdamW here: {', '.join(settings)}; leave it out"
        )
    betas, eps = (chosen.get(name, "auto") for name in ("betas", "eps"))
    betas, eps = Adam.betas if betas == "auto" else betas, Adam.eps if eps == "auto" else eps
    if (
        not isinstance(betas, (list, tuple))
        or len(betas) != 2
        or not all(_is_number(beta) and beta < 1 for beta in betas)
    ):
        raise InputError(
            f"deepspeed.optimizer.params.betas: expected two numbers from 0 to below 1, not {betas!r}"
        )
    if not _is_number(eps):
        raise InputError(f"deepspeed.optimizer.params.eps: expected a number of 0 or more, not {eps!r}")
    return Adam((float(betas[0]), float(betas[1])), float(eps))


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, 0 or more. To Python true is the number 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < inf


def _settle_batch(config: dict[str, Any], training: Training, shape: Shape) -> None:
    _settle(config, "train_batch_size", training.batch_size, "batch_size")
    _settle(config, "train_micro_batch_size_per_gpu", shape.micro_size, "micro_batch_size (and ranks)")
    _settle(
        config, "gradient_accumulation_steps", shape.accumulation, "batch_size / (ranks x micro_batch_size)"
    )
    # DeepSpeed insists on the product, which is larger where the ranks do not divide the batch.
    config["train_batch_size"] = shape.micro_size * shape.accumulation * shape.ranks


def _settle(config: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set `key` where it is absent or "auto"; refuse another value."""
    given = _get(config, key)
    if not _agrees(given, value):
        raise InputError(f'deepspeed.{key}: {given!r} contradicts {source} = {value}; write "auto"')
    section = config
    *parents, last = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise InputError(f"deepspeed.{parent}: expected an object, not {section!r}")
    section[last] = value


def _agrees(given: Any, value: float) -> bool:
    """Whether a setting is left to us, or says the same. To Python true is the number 1, but whoever writes
    it means another thing.
    """
    return given in (None, "auto") or (given == value and isinstance(given, bool) == isinstance(value, bool))


def _fill_buckets(zero: dict[str, Any], hidden_size: int) -> None:
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "allgather_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero.update({name: size for name, size in sizes.items() if zero.get(name) == "auto"})


def _get(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def _walk(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
