"""KnowEdit.

A record has `subject, prompt, target_new, ground_truth?, rephrase_prompt?, portability{group: [...]},
locality{group: [...]}`. `ground_truth`, the old answer, is a list (its ZsRE), a text (wiki_counterfact) or
absent (wiki_recent). A group's items are `{prompt, ground_truth}`: a prompt may be a list, answers may be a
text, a list, or lists of aliases.
"""

from __future__ import annotations

from typing import Any

from pipeline.facts.fact import Fact, Probe
from pipeline.facts.fields import identity, mapping, optional_text, probes, text, texts


def matches(row: dict[str, Any]) -> bool:
    return "prompt" in row and "target_new" in row


def read(row: dict[str, Any], identifier: str) -> list[Fact]:
    """One fact, whose probes carry the name of their group."""
    fact = Fact(
        id=identity(row, "case_id", identifier),
        prompt=text(row, "prompt"),
        subject=optional_text(row, "subject"),
        old_answers=texts(row, "ground_truth"),
        new_answer=text(row, "target_new"),
        rephrasings=texts(row, "rephrase_prompt"),
        locality=_groups(row, "locality"),
        portability=_groups(row, "portability"),
    )
    return [fact]


def _groups(row: dict[str, Any], name: str) -> list[Probe]:
    found = []
    for label, items in mapping(row.get(name) or {}, name).items():
        found += probes(items, f"{name}.{label}", "prompt", "ground_truth", label)
    return found
