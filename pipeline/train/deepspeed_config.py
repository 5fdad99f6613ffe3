"""A user's DeepSpeed JSON made ready: "auto" filled from the experiment, contradictions refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any

from pipeline.errors import InputError
from pipeline.train.batches import Split
from pipeline.train.deepspeed_keys import keep_allowed
from pipeline.training_config import Training


@dataclass(frozen=True)
class Adam:
    """AdamW's settings but for the learning rate, which changes with every step."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Ready:
    """A config that DeepSpeed takes as it is. Optimizer and scheduler are not in it: they are ours."""

    config: dict[str, Any]
    adam: Adam
    warnings: list[str] = field(default_factory=list)

    @property
    def zero_stage(self) -> int:
        return self.config["zero_optimization"]["stage"]

    @property
    def has_monitor(self) -> bool:
        """Whether a monitor (TensorBoard, W&B, CSV, Comet) is on."""
        return any(self.config.get(name, {}).get("enabled") for name in MONITOR_PACKAGES)


MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "csv_monitor": None}
"""The monitors, each with the package that it needs."""


def make_ready(training: Training, num_ranks: int, hidden_size: int) -> Ready:
    """`training.deepspeed`, filled in; `hidden_size` decides the "auto" bucket sizes, as in transformers.

    Raises InputError naming the DeepSpeed key.
    """
    config = keep_allowed(copy.deepcopy(training.deepspeed))
    _require_stage(config)
    adam = _take_optimizer(config, training)
    warnings = list(_drop_unused(config))
    _settle_batch(config, training, Split.of(training.batch_size, training.micro_batch_size, num_ranks))
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
            f"deepspeed.zero_optimization.stage: 1, 2 or 3 is needed, not {stage} (stage 1 computes what"
            " stage 0 would)"
        )


def _drop_unused(config: dict[str, Any]) -> Iterator[str]:
    """Take out what is decided elsewhere; warnings for those who thought it would be used."""
    if config.pop("scheduler", None) is not None:
        yield "deepspeed.scheduler is not used: schedule and warmup_ratio decide the learning rate"
    section = config.pop("activation_checkpointing", {})
    if not isinstance(section, dict):
        raise InputError(f"deepspeed.activation_checkpointing: expected an object, not {section!r}")
    if any(section.values()):
        yield (
            "deepspeed.activation_checkpointing is not used: gradient_checkpointing decides what is kept for"
            " the backward pass"
        )


def _take_optimizer(config: dict[str, Any], training: Training) -> Adam:
    """Remove the optimizer's section and keep what it says.

    We build torch's AdamW ourselves: DeepSpeed's own are compiled where they run, and need a compiler.
    """
    settings = _settings_of_adamw(config.pop("optimizer", {}))
    for name in ("lr", "weight_decay"):
        given, ours = settings.pop(name, None), getattr(training, name)
        if not _agrees(given, ours):
            raise InputError(
                f'deepspeed.optimizer.params.{name}: {given!r} contradicts {name} = {ours}; write "auto"'
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
    stated = {name: value for name, value in chosen.items() if value != "auto"}
    betas, eps = _betas(stated.get("betas", Adam.betas)), _eps(stated.get("eps", Adam.eps))
    return Adam(betas, eps, training.weight_decay)


def _settings_of_adamw(section: Any) -> dict[str, Any]:
    """What the section says of Adam or AdamW, without nulls, which say nothing."""
    if isinstance(section, dict):
        given = {name: value for name, value in section.items() if value is not None}
        section = {"type": "AdamW", "params": {}} | given
    if not isinstance(section, dict) or not isinstance(section["params"], dict):
        raise InputError(f"deepspeed.optimizer: expected an object with type and params, not {section!r}")
    kind = str(section["type"])
    settings = {name: value for name, value in section["params"].items() if value is not None}
    if kind.lower() not in ("adam", "adamw") or not settings.pop("adam_w_mode", True):
        raise InputError(f"deepspeed.optimizer.type: AdamW is what is supported, not {kind}")
    return settings


def _betas(value: Any) -> tuple[float, float]:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not is_pair or not all(_is_number(beta) and beta < 1 for beta in value):
        raise InputError(
            f"deepspeed.optimizer.params.betas: expected two numbers from 0 to below 1, not {value!r}"
        )
    return float(value[0]), float(value[1])


def _eps(value: Any) -> float:
    if not _is_number(value):
        raise InputError(f"deepspeed.optimizer.params.eps: expected a number of 0 or more, not {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, 0 or more, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < inf


def _settle_batch(config: dict[str, Any], training: Training, split: Split) -> None:
    accumulation = "batch_size / (ranks x micro_batch_size)"
    _settle(config, "train_batch_size", training.batch_size, "batch_size")
    _settle(config, "train_micro_batch_size_per_gpu", split.micro_size, "micro_batch_size (and ranks)")
    _settle(config, "gradient_accumulation_steps", split.accumulation, accumulation)
    # DeepSpeed insists on the product, which is larger where the ranks do not divide the batch.
    config["train_batch_size"] = split.micro_size * split.accumulation * split.ranks


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
    """Whether a setting is left to us, or says the same. True is not the number 1, though Python says so."""
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
