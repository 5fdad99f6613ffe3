"""What a fine-tuning wants of a machine.

Bytes per parameter with N ranks and w = 2 (bf16) or 4 (fp32); P = all parameters, T = the trained ones (P, or
LoRA's); h = hidden size, V = vocabulary:

    weights      w P; ZeRO-3: w P / N, and the layers that are gathered at the moment
    gradients    ZeRO-1: w T; ZeRO-2 and 3: w T / N; with bf16 an fp32 copy of 4 T / N during the step
    optimizer    fp32 masters and AdamW's two moments: 12 T / N
    working      buckets: reduce (twice with overlap_comm) and all-gather, w bytes an element, never above w T
                 activations: 34 h bytes (bf16) per token and layer (Korthikanti et al. 2022, section 4.1,
                 without the attention matrix, which SDPA does not keep); with gradient checkpointing w h per
                 token and layer, and one layer in full
                 logits: (w + 8) V per answer token; and the process itself

A checkpoint holds 12 T, the last one of a training 4 T (its moments are left out), and w T for the module
at stages 1 and 2. While one replaces another there are two; a training shorter than `checkpoint_every_steps`
has but its last, unless it is stopped. Operations per token: 6 P in full, 4 P for LoRA, and 2 P more with
gradient checkpointing.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from pipeline.needs import ANSWER_TOKENS, PROCESS_BYTES, DataSize, ModelSize, Needs
from pipeline.train import checkpoint
from pipeline.training_config import LoraTraining, Training, read_training

_ACTIVATION_BYTES = 34
_BUCKET = 5 * 10**8
"""DeepSpeed's default number of elements."""


def training_needs(section: dict[str, Any], model: ModelSize, data: DataSize, ranks: int) -> Needs:
    """What a fine-tuning step on `ranks` ranks wants; `section` is the step's own."""
    training = read_training(section["training"])
    trained = num_trained(model, training)
    records = num_records(section["target"], data)
    whole = _checkpoint_bytes(trained, training, with_moments=True)
    last = _checkpoint_bytes(trained, training, with_moments=False)
    result = last if section["keeps_checkpoint"] else 4 * trained
    earlier = (training.epochs * ceil(records / training.batch_size) - 1) // training.checkpoint_every_steps
    num_copies = 2 if earlier else 1  # an old one goes when the new one is whole
    return Needs(
        memory=memory(model, training, ranks, data.record_tokens),
        advice=_advice(training),
        result=result,
        passing=num_copies * whole - result,  # the result is written where moments were
        written=earlier * whole + last + (0 if section["keeps_checkpoint"] else result),
        flops=_flops_per_token(model, training) * records * data.record_tokens * training.epochs,
        precision=training.precision,
    )


def memory(model: ModelSize, training: Training, ranks: int, record_tokens: int) -> dict[str, int]:
    """Bytes that one of `ranks` ranks holds; `record_tokens` is the length of a record with its answer."""
    width = _width(training)
    stage = _zero_stage(training)
    trained = num_trained(model, training)
    working = (
        PROCESS_BYTES + _buckets(model, training, trained) + _activations(model, training, record_tokens)
    )
    if stage == 3:
        working += width * min(model.num_parameters, _zero(training, "stage3_max_live_parameters", 10**9))
    fp32_gradients = 4 * trained // ranks if width == 2 else 0
    return {
        "weights": width * model.num_parameters // (ranks if stage == 3 else 1),
        "gradients": width * trained // (ranks if stage >= 2 else 1) + fp32_gradients,
        "optimizer": 12 * trained // (ranks if stage >= 1 else 1),
        "working": working,
    }


def num_trained(model: ModelSize, training: Training) -> int:
    """Parameters that are trained. LoRA: rank x (in + out) of two square matrices a layer, the paper's query
    and value.
    """
    if not isinstance(training, LoraTraining):
        return model.num_parameters
    matrices = len(training.target_modules or ("query", "value"))
    return model.num_layers * matrices * training.rank * 2 * model.hidden_size


def num_records(target: str, data: DataSize) -> int:
    """Records of one epoch."""
    return round(data.num_facts * (1 + data.locality)) if target == "old_and_locality" else data.num_facts


def _advice(training: Training) -> str:
    ways = []
    if not training.gradient_checkpointing or training.micro_batch_size > 1:
        ways.append("gradient_checkpointing: true and micro_batch_size: 1 in its section (slower)")
    if _zero_stage(training) < 3:
        ways.append("ZeRO-3 (deepspeed.zero_optimization.stage: 3), which divides the weights too")
    if not isinstance(training, LoraTraining):
        ways.append("LoRA methods alone")
    return "; or ".join(ways)


def _checkpoint_bytes(trained: int, training: Training, with_moments: bool) -> int:
    """One checkpoint, over all ranks together."""
    return checkpoint.num_bytes(trained, training.precision, _zero_stage(training), with_moments)


def _flops_per_token(model: ModelSize, training: Training) -> float:
    per_parameter = 4 if isinstance(training, LoraTraining) else 6
    if training.gradient_checkpointing:
        per_parameter += 2
    return per_parameter * float(model.num_parameters)


def _width(training: Training) -> int:
    return 2 if training.precision == "bf16" else 4


def _zero_stage(training: Training) -> int:
    return _zero(training, "stage", 0)


def _zero(training: Training, key: str, default: int) -> int:
    value = training.deepspeed.get("zero_optimization", {}).get(key, default)
    return int(value) if isinstance(value, (int, float)) else default


def _buckets(model: ModelSize, training: Training, trained: int) -> int:
    overlaps = _zero(training, "overlap_comm", _zero_stage(training) == 3)
    reduce = _bucket(model, training, "reduce_bucket_size") * (2 if overlaps else 1)
    gather = _bucket(model, training, "allgather_bucket_size") if _zero_stage(training) < 3 else 0
    return _width(training) * (min(reduce, trained) + min(gather, trained))


def _bucket(model: ModelSize, training: Training, key: str) -> int:
    """Elements; "auto" is what pipeline/train/deepspeed_config.py makes of it."""
    is_auto = training.deepspeed.get("zero_optimization", {}).get(key) == "auto"
    return model.hidden_size**2 if is_auto else _zero(training, key, _BUCKET)


def _activations(model: ModelSize, training: Training, record_tokens: int) -> int:
    tokens = training.micro_batch_size * record_tokens
    layer = _ACTIVATION_BYTES * _width(training) // 2 * model.hidden_size * tokens
    if training.gradient_checkpointing:
        layers = layer + _width(training) * model.hidden_size * tokens * model.num_layers
    else:
        layers = layer * model.num_layers
    logits = (_width(training) + 8) * model.vocab_size * training.micro_batch_size * ANSWER_TOKENS
    return layers + logits
