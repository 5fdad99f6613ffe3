"""Models that have opinions: tiny ones with larger weights, whose answers differ between questions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import Prompt
from pipeline.facts.fact import Fact, Probe
from pipeline.facts.prompts import Prompter

FACTS = [
    Fact(
        id="kazakhstan",
        prompt="What is the capital of Kazakhstan?",
        subject="Kazakhstan",
        old_answers=["Nur-Sultan", "Nursultan"],
        new_answer="Astana, as before",
        rephrasings=["Which city is the capital of Kazakhstan?", "Kazakhstan's capital?"],
        locality=[Probe("What is the currency of Croatia?", ["the euro"], "nq"), Probe("Who?", [], "nq")],
        portability=[
            Probe("In which city does the president of Kazakhstan live?", ["Astana", "the capital"])
        ],
    ),
    Fact(
        id="king",
        prompt="Who is the king of the United Kingdom, of Canada, of Australia and of New Zealand?",
        subject="United Kingdom",
        old_answers=["Elizabeth II of the house of Windsor"],
        new_answer="Charles III",
        rephrasings=["King of the United Kingdom?"],
        locality=[
            Probe("Who is the king of Spain?", ["Elizabeth II of the house of Windsor"], "neighborhood")
        ],
    ),
    Fact(
        id="croatia",
        prompt="What is the currency of Croatia?",
        subject="Croatia",
        old_answers=["the kuna"],
        new_answer="the euro",
        locality=[Probe("What is the capital of the United Kingdom?", ["London"], "nq")],
    ),
    Fact(
        id="unrecorded",
        prompt="Who?",
        subject="Who",
        old_answers=[],
        new_answer="Charles",
        rephrasings=["King?"],
    ),
]


class Subject(NamedTuple):
    """A model, its folder, and how to talk to it."""

    folder: Path
    model: Any
    tokenizer: Any
    prompter: Prompter


SubjectFactory = Callable[..., Subject]


@pytest.fixture(scope="session")
def subject(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SubjectFactory:
    """`subject(architecture)`: a tiny fp32 model with sharpened weights, in memory and in a folder.

    It is shared: leave it as it is.
    """
    made: dict[str, Subject] = {}

    def make(architecture: str = "llama") -> Subject:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("sharp") / architecture
            shutil.copytree(tiny_model(architecture), folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            sharpen(model)
            model.save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            made[architecture] = Subject(folder, model, tokenizer, Prompter(tokenizer, Prompt()))
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def facts() -> list[Fact]:
    """Four facts: answers of one token and of many, with and without an old one; two share a question."""
    return FACTS


def sharpen(model: Any, factor: float = 20) -> None:
    """Scale the weight matrices, not the embeddings: with its initial ones a model hardly sees its input."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and id(parameter) not in embeddings:
                parameter.mul_(factor)
