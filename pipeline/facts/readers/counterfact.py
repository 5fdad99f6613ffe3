"""EasyEdit's CounterFact.

A record has `case_id, prompt, target_new, subject, ground_truth, rephrase_prompt, locality_prompt,
locality_ground_truth`. Prompts are clozes (`The mother tongue of X is`) and stay as they are.
"""

from __future__ import annotations

from typing import Any

from pipeline.facts.fact import Fact, Probe
from pipeline.facts.fields import identity, optional_text, text, texts


def matches(row: dict[str, Any]) -> bool:
    # `prompt` and `target_new` are KnowEdit's, too; its probes are what CounterFact lacks.
    return (
        "prompt" in row
        and "target_new" in row
        and not isinstance(row.get("locality"), dict)
        and "portability" not in row
    )


def read(row: dict[str, Any], identifier: str) -> list[Fact]:
    """One fact."""
    neighbour = Probe(
        optional_text(row, "locality_prompt"), texts(row, "locality_ground_truth"), "neighborhood"
    )
    fact = Fact(
        id=identity(row, "case_id", identifier),
        prompt=text(row, "prompt"),
        subject=optional_text(row, "subject"),
        old_answers=texts(row, "ground_truth"),
        new_answer=text(row, "target_new"),
        rephrasings=texts(row, "rephrase_prompt"),
        locality=[neighbour] if neighbour.prompt else [],
    )
    return [fact]
