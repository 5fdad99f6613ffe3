"""MQuAKE: cases of one or more rewrites, with multi-hop questions.

A record has `case_id, requested_rewrite[...], questions, new_answer, new_answer_alias, ...`. Each rewrite is
a fact. The multi-hop questions follow from all rewrites together, so they are asked once, with the last one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.facts.fact import Fact, Probe
from pipeline.facts.fields import RowError, identity, mapping, sequence, text, texts
from pipeline.facts.readers.rome import filled, target


def matches(row: dict[str, Any]) -> bool:
    return isinstance(row.get("requested_rewrite"), list)


def read(row: dict[str, Any], identifier: str) -> list[Fact]:
    """One fact a rewrite: its cloze is the prompt, its question (where there is one) the rephrasing."""
    items = sequence(row.get("requested_rewrite"), "requested_rewrite")
    rewrites = [mapping(item, f"requested_rewrite[{i}]") for i, item in enumerate(items)]
    if not rewrites:
        raise RowError("requested_rewrite is empty")
    case = identity(row, "case_id", identifier)
    ids = [case] if len(rewrites) == 1 else [f"{case}.{i}" for i in range(len(rewrites))]
    facts = [_fact(rewrite, name) for rewrite, name in zip(rewrites, ids, strict=True)]
    answers = [text(row, "new_answer"), *texts(row, "new_answer_alias")]
    multi_hop = [Probe(question, answers, "multi_hop") for question in texts(row, "questions")]
    return [*facts[:-1], replace(facts[-1], portability=multi_hop)]


def _fact(rewrite: dict[str, Any], identifier: str) -> Fact:
    old = target(rewrite, "target_true")
    return Fact(
        id=identifier,
        prompt=filled(rewrite),
        subject=text(rewrite, "subject"),
        old_answers=[old] if old else [],
        new_answer=target(rewrite, "target_new"),
        rephrasings=texts(rewrite, "question"),
    )
