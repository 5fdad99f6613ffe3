"""MEND's and EasyEdit's ZsRE: `subject, src, pred, rephrase, alt, answers, loc, loc_ans, cond`.

The paper learns `alt` and forgets `pred`: the answer of the model that MEND edited, true in a fifth of the
records. EasyEdit's old answer is the first of `answers`, the true ones.
"""

from __future__ import annotations

from typing import Any

from pipeline.facts.fact import Fact, Probe
from pipeline.facts.fields import optional_text, text, texts

_LOCALITY_PREFIX = "nq question: "  # MEND's marker of a Natural Questions item


def matches(row: dict[str, Any]) -> bool:
    return "src" in row and "alt" in row


def read(row: dict[str, Any], identifier: str, old_answer: str = "pred") -> list[Fact]:
    """One fact. `old_answer` names the field with the old answers: `pred` or `answers`."""
    unrelated = Probe(optional_text(row, "loc").removeprefix(_LOCALITY_PREFIX), texts(row, "loc_ans"), "nq")
    fact = Fact(
        id=identifier,
        prompt=text(row, "src"),
        subject=optional_text(row, "subject"),
        old_answers=texts(row, old_answer),
        new_answer=text(row, "alt"),
        rephrasings=texts(row, "rephrase"),
        locality=[unrelated] if unrelated.prompt else [],
    )
    return [fact]
