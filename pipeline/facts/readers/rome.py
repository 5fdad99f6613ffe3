"""ROME's CounterFact and multi_counterfact.

Read are `case_id, requested_rewrite{prompt, subject, target_new, target_true}, paraphrase_prompts,
neighborhood_prompts`. `attribute_prompts` and `generation_prompts` serve metrics that are not taken here.
"""

from __future__ import annotations

from typing import Any

from pipeline.facts.fact import Fact, Probe
from pipeline.facts.fields import identity, mapping, text, texts


def matches(row: dict[str, Any]) -> bool:
    return isinstance(row.get("requested_rewrite"), dict)


def read(row: dict[str, Any], identifier: str) -> list[Fact]:
    """One fact. Neighbourhood prompts ask about other subjects whose right answer is the old answer."""
    rewrite = mapping(row.get("requested_rewrite"), "requested_rewrite")
    old = target(rewrite, "target_true")
    old_answers = [old] if old else []
    fact = Fact(
        id=identity(row, "case_id", identifier),
        prompt=filled(rewrite),
        subject=text(rewrite, "subject"),
        old_answers=old_answers,
        new_answer=target(rewrite, "target_new"),
        rephrasings=texts(row, "paraphrase_prompts"),
        locality=[
            Probe(prompt, old_answers, "neighborhood") for prompt in texts(row, "neighborhood_prompts")
        ],
    )
    return [fact]


def filled(rewrite: dict[str, Any]) -> str:
    """The rewrite's prompt with its subject in the place of `{}`."""
    return text(rewrite, "prompt").replace("{}", text(rewrite, "subject"))


def target(rewrite: dict[str, Any], name: str) -> str:
    """The text of `target_new` or `target_true`, each an object `{"str": ..., "id": ...}`."""
    return text(mapping(rewrite.get(name), name), "str")
