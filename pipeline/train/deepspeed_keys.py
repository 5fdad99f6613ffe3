"""Which settings of a DeepSpeed JSON a training here may have: those that keep its guarantees, and no others.

A setting that DeepSpeed knows and we do not might round the masters, scale the gradients or write another
checkpoint, all in silence. So everything that is not in the tables below is refused by its name, and so is
what a later DeepSpeed adds.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Literal

from pipeline.errors import InputError

_ELSEWHERE = (
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping"
    " bf16.enabled optimizer scheduler activation_checkpointing zero_optimization.stage"
)
_SWITCHES = (
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"
    " wall_clock_breakdown memory_breakdown dump_state"
    " zero_optimization.overlap_comm zero_optimization.contiguous_gradients zero_optimization.reduce_scatter"
    " zero_optimization.use_multi_rank_bucket_allreduce zero_optimization.allgather_partitions"
    " zero_optimization.ignore_unused_parameters zero_optimization.memory_efficient_linear"
    " zero_optimization.stage3_gather_16bit_weights_on_model_save"
    " zero_optimization.stage3_gather_fp16_weights_on_model_save"
    " zero_optimization.log_trace_cache_warnings zero_optimization.enable_sanity_checks"
    " tensorboard.enabled wandb.enabled csv_monitor.enabled comet.enabled comet.online"
)
_SIZES = (
    "steps_per_print zero_optimization.reduce_bucket_size zero_optimization.allgather_bucket_size"
    " zero_optimization.sub_group_size"
    " zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance"
    " zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_param_persistence_threshold"
    " zero_optimization.stage3_model_persistence_threshold comet.samples_log_interval"
)
_TEXTS = (
    "tensorboard.output_path tensorboard.job_name csv_monitor.output_path csv_monitor.job_name"
    " wandb.project wandb.group wandb.team"
    " comet.project comet.workspace comet.experiment_name comet.experiment_key"
)
_WORDS = {
    "checkpoint.tag_validation": ("warn", "ignore", "fail"),
    "comet.mode": ("get", "create", "get_or_create"),
}
_FREE: dict[str, Literal["any", "switch", "size", "text", "word"]] = {
    **dict.fromkeys(_ELSEWHERE.split(), "any"),
    **dict.fromkeys(_SWITCHES.split(), "switch"),
    **dict.fromkeys(_SIZES.split(), "size"),
    **dict.fromkeys(_TEXTS.split(), "text"),
    **dict.fromkeys(_WORDS, "word"),
}
"""Settings that may have any value of their kind: of no consequence for the result, or (`any`) looked at
elsewhere.
"""

_ONLY: dict[str, tuple[Any, ...]] = {
    "zero_optimization.load_from_fp32_weights": (True,),
    "zero_optimization.compute_grad_norm": (True,),
    "zero_optimization.override_module_apply": (True,),
    "zero_optimization.zero_hpz_partition_size": (0, 1),
    "zero_optimization.mics_shard_size": (-1,),
    "zero_optimization.stage3_module_granularity_threshold": (0,),
    "managed_gradient_accumulation": (True,),
    "gradient_predivide_factor": (1,),
    "gradient_allreduce_op": ("mean",),
    "sequence_parallel_size": (1,),
}
"""Settings that are fine where they say what would hold without them: these values, else false or null."""

_OFFLOAD = (
    "offloading to CPU or NVMe is not supported; leave it out, and use ZeRO-3, more ranks or LoRA where"
    " memory is short"
)
_PRECISION = "precision decides what is computed in what, over fp32 masters; leave it out"
_GRADIENTS = (
    "gradients are averaged by the batch's answer tokens, with their norm, in the precision's own type;"
    " leave it out"
)
_SHARDING = "a model is sharded by ZeRO over all ranks and nothing else; leave it out"
_CHECKPOINT = "checkpoints must be torch files that are whole when saving returns; leave it out"
_BATCHES = "batches are made by flearn; leave it out"
_RUNS = "it starts other runs, or another number of ranks; leave it out"
_QUANTIZED = "weights and gradients are never quantized or pruned here; leave it out"

_REASONS = {
    "zero_optimization.round_robin_gradients": (
        "DeepSpeed then writes checkpoints whose parameters are mixed up; set it to false"
    ),
    "zero_optimization.elastic_checkpoint": "DeepSpeed cannot load what it then writes; leave it out",
    "zero_optimization.load_from_fp32_weights": "a resumed run would round its masters to bf16; leave it out",
    "managed_gradient_accumulation": "every micro-batch would become an optimizer step; leave it out",
    "fp16": "fp16 is not supported; set precision to bf16 or fp32",
    "bfloat16": "an old name; write bf16",
    "comet.api_key": "every manifest would show it; set the variable COMET_API_KEY instead",
    **dict.fromkeys(
        ["aio", *(f"zero_optimization.{name}" for name in ("offload_", "cpu_offload", "zenflow"))], _OFFLOAD
    ),
    **dict.fromkeys(["bf16", "amp", "torch_autocast", "data_types"], _PRECISION),
    **dict.fromkeys(
        ["communication_data_type", "prescale_gradients", "gradient_", "zero_optimization.compute_grad_norm"],
        _GRADIENTS,
    ),
    **dict.fromkeys(
        [
            "tensor_parallel",
            "sequence_parallel",
            "pipeline",
            "expert_parallel",
            "moe",
            "zero_optimization.mics_",
        ],
        _SHARDING,
    ),
    **dict.fromkeys(
        ["use_data_before_expert_parallelism", "zero_optimization.zero_hpz_partition_size"], _SHARDING
    ),
    **dict.fromkeys(["checkpoint", "datastates_ckpt", "nebula"], _CHECKPOINT),
    **dict.fromkeys(["data_efficiency", "curriculum_learning", "dataloader_drop_last"], _BATCHES),
    **dict.fromkeys(["autotuning", "elasticity"], _RUNS),
    **dict.fromkeys(
        ["compression_training", "weight_quantization", "zero_optimization.zero_quantized_"], _QUANTIZED
    ),
}
"""Why not, by how a setting's name begins."""

_NOT_KNOWN = "not among the settings known to keep a training right here; leave it out"


def keep_allowed(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without what says nothing: nulls, sections switched off, settings that repeat a default.

    Raises InputError naming the first setting that is not known to be right here, and why.
    """
    return _kept(config, "")


def _kept(section: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name: value for key, given in section.items() for name, value in _keep(key, given, prefix)}


def _keep(key: str, value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The one setting, or none if it says nothing."""
    name = f"{prefix}{key}"
    if name in _FREE:
        if value is not None and not (
            _FREE[name] == "switch" and value == "auto"
        ):  # DeepSpeed's own default then holds
            _require_kind(name, value)
            yield key, value
    elif value is not None and any(free.startswith(f"{name}.") for free in _FREE):
        if not isinstance(value, dict):
            raise InputError(f"deepspeed.{name}: expected an object, not {value!r}")
        yield key, _kept(value, f"{name}.")
    elif not _says_nothing(name, value):
        raise InputError(f"deepspeed.{_first_named(name, value)}: {_reason(name)}")


def _require_kind(name: str, value: Any) -> None:
    kind, is_switch = _FREE[name], isinstance(value, bool)
    wanted = ""
    if kind == "switch" and not is_switch:
        wanted = "true or false"
    if (
        kind == "size"
        and value != "auto"
        and (is_switch or not isinstance(value, (int, float)) or value < 0 or value % 1 != 0)
    ):
        wanted = "a whole number"
    if kind == "text" and not isinstance(value, str):
        wanted = "a text"
    if kind == "word" and str(value).lower() not in _WORDS[name]:
        wanted = f"one of {', '.join(_WORDS[name])}"
    if wanted:
        raise InputError(f"deepspeed.{name}: expected {wanted}, not {value!r}")


def _says_nothing(name: str, value: Any) -> bool:
    if isinstance(value, dict):
        off = (
            value.get("enabled") in ((False, "auto") if name in ("fp16", "amp") else (False,))
            or value.get("device") == "none"
        )
        return off or all(_says_nothing(f"{name}.{key}", inner) for key, inner in value.items())
    return value is None or value in _ONLY.get(name, (False,))


def _first_named(name: str, value: Any) -> str:
    """The setting to name: of a section its switch, or else the first that says something."""
    if not isinstance(value, dict) or "device" in value:
        return name
    if "enabled" in value:
        return f"{name}.enabled"
    return next(
        _first_named(f"{name}.{key}", inner)
        for key, inner in value.items()
        if not _says_nothing(f"{name}.{key}", inner)
    )


def _reason(name: str) -> str:
    reasons = [
        reason
        for start, reason in sorted(_REASONS.items(), key=lambda item: -len(item[0]))
        if name.startswith(start)
    ]
    near = difflib.get_close_matches(name, [*_FREE, *_ONLY], n=1, cutoff=0.9)
    return reasons[0] if reasons else f"unknown; did you mean {near[0]}?" if near else _NOT_KNOWN
