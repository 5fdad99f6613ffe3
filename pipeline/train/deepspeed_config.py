"""A user's DeepSpeed JSON made ready: "auto" filled from the experiment, contradictions and what would corrupt silently refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Training
from pipeline.errors import InputError
from pipeline.train.batches import Shape

_UNTESTED_OFFLOAD = "offloading is not tested here yet; leave it out"
_OWN_MASTERS = "the masters and moments must stay in fp32; leave it out"
_OTHER_CHECKPOINT = "checkpoints must be torch files that are whole when saving returns; leave it out"

_REFUSED = {
    "zero_optimization.round_robin_gradients": "DeepSpeed then writes checkpoints whose parameters are mixed up; leave it out",
    "zero_optimization.elastic_checkpoint": "DeepSpeed cannot load what it then writes; leave it out",
    "zero_optimization.cpu_offload": _UNTESTED_OFFLOAD,
    "zero_optimization.cpu_offload_param": _UNTESTED_OFFLOAD,
    "zero_optimization.zenflow": _UNTESTED_OFFLOAD,
    "zero_optimization.zero_quantized_weights": "quantized weights are not tested here; leave it out",
    "zero_optimization.zero_quantized_nontrainable_weights": "quantized weights are not tested here; leave it out",
    "zero_optimization.zero_quantized_gradients": "quantized gradients are not tested here; leave it out",
    "fp16.enabled": "fp16 is not supported; set precision to bf16 or fp32",
    "bfloat16": "an old name; write bf16",
    "bf16.bf16_master_weights_and_grads": _OWN_MASTERS,
    "bf16.bf16_optimizer_states": _OWN_MASTERS,
    "torch_autocast.enabled": "precision decides what is computed in what; leave it out",
    "amp.enabled": "precision decides what is computed in what; leave it out",
    "checkpoint.writer": _OTHER_CHECKPOINT,
    "checkpoint.load_universal": _OTHER_CHECKPOINT,
    "datastates_ckpt": _OTHER_CHECKPOINT,
    "compile.deepcompile": "not tested here; leave it out",
    "data_efficiency.enabled": "batches are made by flearn; leave it out",
    "curriculum_learning.enabled": "batches are made by flearn; leave it out",
    "autotuning.enabled": "autotuning starts other runs; leave it out",
}
"""Settings that may not be switched on, and why."""


_NEEDED = {
    "zero_optimization.load_from_fp32_weights": "a resumed run would round its masters to bf16; leave it out",
    "managed_gradient_accumulation": "every micro-batch would become an optimizer step; leave it out",
}
"""Settings that may not be switched off, and why."""


@dataclass(frozen=True)
class Adam:
    """AdamW's settings beside the learning rate and the weight decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class Ready:
    """A config that DeepSpeed takes as it is, without optimizer and scheduler (those are ours), and what came out of them."""

    config: dict[str, Any]
    adam: Adam
    warnings: list[str] = field(default_factory=list)

    @property
    def zero_stage(self) -> int:
        return self.config["zero_optimization"]["stage"]


def make_ready(training: Training, shape: Shape, hidden_size: int) -> Ready:
    """`training.deepspeed`, filled in. `hidden_size` decides ZeRO-3's "auto" bucket sizes, as in transformers.

    Raises InputError naming the DeepSpeed key.
    """
    config = copy.deepcopy(training.deepspeed)
    warnings = []
    _refuse(config)
    adam = _take_optimizer(config, training)
    if config.pop("scheduler", None) is not None:
        warnings.append("deepspeed.scheduler is not used: schedule and warmup_ratio decide the learning rate")
    _settle_batch(config, training, shape)
    _settle(config, "gradient_clipping", training.max_grad_norm, "max_grad_norm")
    _settle(config, "bf16.enabled", training.precision == "bf16", "precision")
    config.pop("fp16", None)
    _fill_buckets(config["zero_optimization"], hidden_size)
    config["zero_allow_untested_optimizer"] = True
    for key, value in _walk(config):
        if value == "auto":
            raise InputError(f'deepspeed.{key}: there is nothing to fill "auto" from; give a value')
    return Ready(config, adam, warnings)


def _refuse(config: dict[str, Any]) -> None:
    """Raise for what is known to be fatal or silent, or was never tried."""
    for key, reason in _REFUSED.items():
        if _get(config, key) not in (None, False, 0, "auto"):
            raise InputError(f"deepspeed.{key}: {reason}")
    for key, reason in _NEEDED.items():
        if _get(config, key) is False:
            raise InputError(f"deepspeed.{key}: {reason}")
    stage = _get(config, "zero_optimization.stage")
    if stage not in (1, 2, 3):
        raise InputError(f"deepspeed.zero_optimization.stage: 1, 2 or 3 is needed, not {stage} (stage 1 computes what stage 0 would)")
    for name in ("offload_optimizer", "offload_param"):
        if _get(config, f"zero_optimization.{name}.device") not in (None, "none"):
            raise InputError(f"deepspeed.zero_optimization.{name}: {_UNTESTED_OFFLOAD}")
    if _get(config, "zero_optimization.zero_hpz_partition_size") not in (None, 0, 1):
        raise InputError("deepspeed.zero_optimization.zero_hpz_partition_size: secondary partitions are not tested here; leave it out")
    accumulated = _get(config, "data_types.grad_accum_dtype")
    if stage == 1 and accumulated in ("fp32", "float32"):
        raise InputError("deepspeed.data_types.grad_accum_dtype: DeepSpeed's stage 1 writes another checkpoint with it; use stage 2")


def _take_optimizer(config: dict[str, Any], training: Training) -> Adam:
    """Remove the optimizer's section and keep what it says. We build torch's AdamW ourselves: DeepSpeed's need a compiler."""
    section = config.pop("optimizer", {})
    if not isinstance(section, dict):
        raise InputError(f"deepspeed.optimizer: expected an object, not {section!r}")
    kind, settings = section.get("type", "AdamW"), dict(section.get("params", {}))
    if kind.lower() not in ("adam", "adamw") or not settings.pop("adam_w_mode", True):
        raise InputError(f"deepspeed.optimizer.type: AdamW is what is supported, not {kind}")
    for name in ("lr", "weight_decay"):
        given = settings.pop(name, "auto")
        if given not in ("auto", getattr(training, name)):
            raise InputError(f'deepspeed.optimizer.params.{name}: {given} contradicts {name} {getattr(training, name)}; write "auto"')
    settings.pop("torch_adam", None)
    chosen = {name: settings.pop(name) for name in ("betas", "eps") if name in settings}
    if settings:
        raise InputError(f"deepspeed.optimizer.params: no such setting of AdamW here: {', '.join(settings)}; leave it out")
    betas, eps = (chosen.get(name, "auto") for name in ("betas", "eps"))
    return Adam(Adam.betas if betas == "auto" else (betas[0], betas[1]), Adam.eps if eps == "auto" else eps)


def _settle_batch(config: dict[str, Any], training: Training, shape: Shape) -> None:
    _settle(config, "train_batch_size", training.batch_size, "batch_size")
    _settle(config, "train_micro_batch_size_per_gpu", shape.micro_size, "micro_batch_size (and ranks)")
    _settle(config, "gradient_accumulation_steps", shape.accumulation, "batch_size / (ranks x micro_batch_size)")
    # DeepSpeed insists on the product, which is larger where the ranks do not divide the batch.
    config["train_batch_size"] = shape.micro_size * shape.accumulation * shape.ranks


def _settle(config: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set `key` where it is absent or "auto"; refuse another value."""
    given = _get(config, key)
    if given not in (None, "auto", value):
        raise InputError(f'deepspeed.{key}: {given} contradicts {source} = {value}; write "auto"')
    section = config
    *parents, last = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise InputError(f"deepspeed.{parent}: expected an object, not {section!r}")
    section[last] = value


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
