"""How much memory, disk and time a stage will want, from the model's size and the settings alone.

Bytes per parameter, with N ranks and w = 2 (bf16) or 4 (fp32); P = all parameters, T = the trained ones (P,
or LoRA's):

    weights           w P (ZeRO-3: w P / N, and the layers that are gathered at the moment) gradients
    ZeRO-1: w T;  ZeRO-2 and 3: w T / N;  with bf16 an fp32 copy of 4 T / N during the step fp32 master,
    AdamW's two moments   12 T / N buckets           reduce (twice with overlap_comm) and all-gather, w bytes
    an element, never larger than w T activations       34 h bytes (bf16) per token and layer (Korthikanti et
    al. 2022, section 4.1, without the attention matrix,
                      which SDPA does not keep); with gradient checkpointing w h per token and layer, and one
                      layer in full
    logits            (w + 8) V bytes per answer token
    the process       0.6 GB: Python, torch, transformers and DeepSpeed, or a CUDA context

An evaluation holds the weights, keys and values of a batch of questions, and 8 V bytes of logits per answer
token.

A checkpoint holds 12 bytes per trained parameter, the last one of a training 4 (its moments are left out),
and w T for the module at stages 1 and 2. While one replaces another there are two; a training shorter than
`checkpoint_every_steps` has but its last, unless it is stopped. Time is 6 P floating-point operations per
token of full fine-tuning (8 P with gradient checkpointing), 4 P of LoRA (6 P), 2 P of evaluation: computing
alone, without the ranks' messages and the disk. All of it is meant to be right within a factor of two or so,
not more.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline import config
from pipeline.config import Evaluate, LoraTraining, Training
from pipeline.plan import Step
from pipeline.train import checkpoint

ANSWER_TOKENS = 10
"""Tokens of an answer with its EOS; the short answers of ZsRE have 4 to 8."""
PROCESS_BYTES = 600_000_000
_ACTIVATION_BYTES = 34
_BUCKET = 5 * 10**8
"""DeepSpeed's default number of elements."""


class Shape(NamedTuple):
    """What of a model decides its costs."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int


class Data(NamedTuple):
    """How much text there is: facts, and the average tokens of a question with its answer."""

    num_facts: int
    record_tokens: int
    locality: float
    """Unrelated questions per fact."""
    questions: float
    """All questions that an evaluation asks about a fact."""


class Memory(NamedTuple):
    """Bytes that one rank of a fine-tuning holds at its peak."""

    weights: int
    gradients: int
    optimizer: int
    working: int
    """Buckets, gathered layers, activations, logits, and the process itself."""

    @property
    def total(self) -> int:
        return sum(self)


def training_of(step: Step) -> Training:
    """The settings of a fine-tuning step."""
    return config.read_training(step.section["training"])


def zero_stage(training: Training) -> int:
    """The ZeRO stage that `training` asks for."""
    return _zero(training, "stage", 0)


def num_trained(shape: Shape, training: Training) -> int:
    """Parameters that are trained. LoRA: rank x (in + out) of two square matrices a layer, the paper's query
    and value.
    """
    if isinstance(training, LoraTraining):
        matrices = len(training.target_modules or ("query", "value"))
        return shape.num_layers * matrices * training.rank * 2 * shape.hidden_size
    return shape.num_parameters


def training_memory(shape: Shape, training: Training, ranks: int, record_tokens: int) -> Memory:
    """What one of `ranks` ranks holds; `record_tokens` is the length of a record with prompt and answer."""
    width = _width(training)
    stage = zero_stage(training)
    trained = num_trained(shape, training)
    weights = width * shape.num_parameters // (ranks if stage == 3 else 1)
    gradients = width * trained // (ranks if stage >= 2 else 1) + (4 * trained // ranks if width == 2 else 0)
    optimizer = 12 * trained // (ranks if stage >= 1 else 1)
    working = (
        PROCESS_BYTES + _buckets(shape, training, trained) + _activations(shape, training, record_tokens)
    )
    if stage == 3:
        working += width * min(shape.num_parameters, _zero(training, "stage3_max_live_parameters", 10**9))
    return Memory(weights, gradients, optimizer, working)


def evaluation_memory(shape: Shape, settings: Evaluate, record_tokens: int) -> tuple[int, int]:
    """What one rank of an evaluation holds: weights, and what works on them."""
    width = 2 if settings.precision == "bf16" else 4
    cache = (
        2
        * width
        * shape.num_layers
        * shape.hidden_size
        * settings.batch_size
        * (record_tokens + settings.max_new_tokens)
    )
    logits = 8 * shape.vocab_size * settings.batch_size * ANSWER_TOKENS
    return width * shape.num_parameters, PROCESS_BYTES + cache + logits


def num_records(step: Step, data: Data) -> int:
    """Records of one epoch."""
    with_locality = step.section["target"] == "old_and_locality"
    return round(data.num_facts * (1 + data.locality)) if with_locality else data.num_facts


def checkpoint_bytes(shape: Shape, training: Training, with_moments: bool = True) -> int:
    """One checkpoint, over all ranks together; the last one of a training is without moments."""
    return checkpoint.num_bytes(
        num_trained(shape, training), training.precision, zero_stage(training), with_moments
    )


def training_flops(shape: Shape, training: Training, num_tokens: int) -> float:
    """Floating-point operations of a fine-tuning that sees `num_tokens` tokens an epoch."""
    per_parameter = (4 if isinstance(training, LoraTraining) else 6) + (
        2 if training.gradient_checkpointing else 0
    )
    return per_parameter * float(shape.num_parameters) * num_tokens * training.epochs


def _width(training: Training) -> int:
    return 2 if training.precision == "bf16" else 4


def _zero(training: Training, key: str, default: int) -> int:
    value = training.deepspeed.get("zero_optimization", {}).get(key, default)
    return int(value) if isinstance(value, (int, float)) else default


def _buckets(shape: Shape, training: Training, trained: int) -> int:
    overlaps = _zero(training, "overlap_comm", zero_stage(training) == 3)
    reduce = _bucket(shape, training, "reduce_bucket_size") * (2 if overlaps else 1)
    gather = _bucket(shape, training, "allgather_bucket_size") if zero_stage(training) < 3 else 0
    return _width(training) * (min(reduce, trained) + min(gather, trained))


def _bucket(shape: Shape, training: Training, key: str) -> int:
    """Elements; "auto" is what pipeline/train/deepspeed_config.py makes of it."""
    is_auto = training.deepspeed.get("zero_optimization", {}).get(key) == "auto"
    return shape.hidden_size**2 if is_auto else _zero(training, key, _BUCKET)


def _activations(shape: Shape, training: Training, record_tokens: int) -> int:
    tokens = training.micro_batch_size * record_tokens
    layer = _ACTIVATION_BYTES * _width(training) // 2 * shape.hidden_size * tokens
    if training.gradient_checkpointing:
        layers = layer + _width(training) * shape.hidden_size * tokens * shape.num_layers
    else:
        layers = layer * shape.num_layers
    logits = (_width(training) + 8) * shape.vocab_size * training.micro_batch_size * ANSWER_TOKENS
    return layers + logits
