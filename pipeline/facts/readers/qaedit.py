"""QAEdit: right answers to learn, without old ones.

A record has `id, source, prompt, target, subject, rephrase, locality[{loc, loc_ans}]`.
"""

from __future__ import annotations

from typing import Any

from pipeline.facts.fact import Fact
from pipeline.facts.fields import identity, optional_text, probes, text, texts


def matches(row: dict[str, Any]) -> bool:
    return "prompt" in row and "target" in row


def read(row: dict[str, Any], identifier: str) -> list[Fact]:
    """One fact without old answers."""
    fact = Fact(
        id=identity(row, "id", identifier),
        prompt=text(row, "prompt"),
        subject=optional_text(row, "subject"),
        old_answers=[],
        new_answer=text(row, "target"),
        rephrasings=texts(row, "rephrase"),
        locality=probes(row.get("locality"), "locality", "loc", "loc_ans", "nq"),
    )
    return [fact]
