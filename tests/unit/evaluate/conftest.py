"""Models that have opinions: the tiny ones with larger weights, whose answers differ from question to question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import Prompt
from pipeline.facts.prompts import Prompter

ARCHITECTURES = ("llama", "gpt2", "bloom")


class Subject(NamedTuple):
    """A model, and how to talk to it."""

    model: Any
    tokenizer: Any
    prompter: Prompter


SubjectFactory = Callable[..., Subject]


@pytest.fixture(scope="session")
def subject(tiny_model: Callable[..., Path]) -> SubjectFactory:
    """`subject(architecture)`: a tiny model in fp32 with sharpened weights; do not change it."""
    made: dict[str, Subject] = {}

    def make(architecture: str = "llama") -> Subject:
        if architecture not in made:
            folder = tiny_model(architecture)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            sharpen(model)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            made[architecture] = Subject(model, tokenizer, Prompter(tokenizer, Prompt()))
        return made[architecture]

    return make


def sharpen(model: Any, factor: float = 20) -> None:
    """Scale the weight matrices, but not the embeddings: a model at its initial weights hardly looks at its input."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and id(parameter) not in embeddings:
                parameter.mul_(factor)
