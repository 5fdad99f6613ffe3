"""What a step wants of a machine: bytes of memory and disk, and operations. Each stage's own module says how
much, from the model's size and the settings alone (`pipeline/stages.py` names it).

All of it is meant to be right within a factor of two or so, not more.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

ANSWER_TOKENS = 10
"""Tokens of an answer with its EOS; the short answers of ZsRE have 4 to 8."""
PROCESS_BYTES = 600_000_000
"""Python, torch, transformers and DeepSpeed, or a CUDA context."""


class ModelSize(NamedTuple):
    """What of a model decides its costs."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int


class DataSize(NamedTuple):
    """How much text there is: facts, and the average tokens of a question with its answer."""

    num_facts: int
    record_tokens: int
    locality: float
    """Unrelated questions per fact."""
    questions: float
    """All questions that an evaluation asks about a fact."""


class Needs(NamedTuple):
    """What one step wants."""

    memory: dict[str, int]
    """Bytes that one process holds at its peak, by what they are."""
    advice: str = ""
    """Which of its settings want less memory."""
    result: int = 0
    """Bytes that stay on the disk."""
    passing: int = 0
    """Bytes that come and go beside the result, or before it: checkpoints."""
    written: int = 0
    """All bytes that are written from the step's start to its end."""
    flops: float = 0.0
    """Floating-point operations of all processes together: computing alone, without messages and the disk."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """What most of the operations are in."""
