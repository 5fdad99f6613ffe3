"""Alpaca pairs, the paper's own form: two files of `instruction, input, output`, the old answers and the new
ones to the same questions.

A single file holds new answers only.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

from pipeline.facts.fact import Fact
from pipeline.facts.fields import optional_text, text, texts
from pipeline.facts.rows import Row

_OLD = "old_output"


def matches(row: dict[str, Any]) -> bool:
    return "instruction" in row and "output" in row


def read(row: dict[str, Any], identifier: str) -> list[Fact]:
    """One fact; an `input` follows its instruction on a line of its own."""
    parts = (text(row, "instruction"), optional_text(row, "input"))
    fact = Fact(
        id=identifier,
        prompt="\n".join(part for part in parts if part),
        subject="",
        old_answers=texts(row, _OLD),
        new_answer=text(row, "output"),
    )
    return [fact]


def pair(old: list[Row], new: list[Row]) -> list[Row]:
    """The records of the new file with the old file's answer to the same question, in the new file's order.

    A question of the old file that the new one lacks comes last, with an empty new answer.
    """
    waiting: dict[str, deque[Row]] = defaultdict(deque)
    for row in old:
        waiting[_question(row)].append(row)
    paired = [_with_old(row, waiting[_question(row)]) for row in new]
    left = [row for rows in waiting.values() for row in rows]
    return paired + [
        Row(row.where, {**row.value, "output": "", _OLD: row.value.get("output")}) for row in left
    ]


def _with_old(row: Row, candidates: deque[Row]) -> Row:
    return (
        Row(row.where, {**row.value, _OLD: candidates.popleft().value.get("output")}) if candidates else row
    )


def _question(row: Row) -> str:
    return "\n".join(str(row.value.get(name) or "").strip() for name in ("instruction", "input"))
