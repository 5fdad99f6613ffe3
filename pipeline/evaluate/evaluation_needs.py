"""What an evaluation wants of a machine: memory for weights, cache and logits, and operations."""

from __future__ import annotations

from typing import Any

from pipeline.config import Evaluate
from pipeline.needs import ANSWER_TOKENS, PROCESS_BYTES, DataSize, ModelSize, Needs


def evaluation_needs(section: dict[str, Any], model: ModelSize, data: DataSize, ranks: int) -> Needs:
    """What an evaluation step wants; each rank holds the whole model. `section` is the step's own."""
    settings = Evaluate.model_validate(section["evaluate"])
    width = 2 if settings.precision == "bf16" else 4
    longest = data.record_tokens + settings.max_new_tokens
    # Keys and values of a batch of questions, and of the lines that are written after them.
    cache = 2 * width * model.num_layers * model.hidden_size * settings.batch_size * longest
    # In fp32, and as much again while their logsumexp is taken.
    logits = 8 * model.vocab_size * settings.batch_size * ANSWER_TOKENS
    tokens_a_question = data.record_tokens * len(settings.protocols) + settings.max_new_tokens
    return Needs(
        memory={"weights": width * model.num_parameters, "working": PROCESS_BYTES + cache + logits},
        advice=_advice(settings),
        # A multiplication and an addition for each parameter and token.
        flops=2.0 * model.num_parameters * data.num_facts * data.questions * tokens_a_question,
        precision=settings.precision,
    )


def _advice(settings: Evaluate) -> str:
    ways = ["a smaller evaluate.batch_size"] if settings.batch_size > 1 else []
    if settings.precision == "fp32":
        ways.append("evaluate.precision: bf16, which halves the weights but rounds a small subtraction away")
    return "; or ".join(ways)
