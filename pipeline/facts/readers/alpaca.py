"""Alpaca pairs, the paper's own form: `instruction, input, output`.

Two files answer the same questions, one with the old answers, one with the new. A single file holds new
answers only.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

from pipeline.facts.fact import Fact
from pipeline.facts.fields import optional_text, text, texts
from pipeline.facts.rows import Row

_OLD = "old_output"
"""The field that `pair` adds to a record of the new file."""


def matches(row: dict[str, Any]) -> bool:
    return "instruction" in row and "output" in row


def read(row: dict[str, Any], identifier: str) -> list[Fact]:
    """One fact; an `input` follows its instruction on a line of its own."""
    lines = (text(row, "instruction"), optional_text(row, "input"))
    fact = Fact(
        id=identifier,
        prompt="\n".join(line for line in lines if line),
        subject="",
        old_answers=texts(row, _OLD),
        new_answer=text(row, "output"),
    )
    return [fact]


def pair(old: list[Row], new: list[Row]) -> list[Row]:
    """The records of `new`, in order, each with the answer of `old` to the same question.

    Questions that only `old` has come last, with an empty new answer, so that their loss is counted.
    """
    # A question may come several times: its first new answer gets its first old one, and so on.
    waiting: dict[str, deque[Row]] = defaultdict(deque)
    for row in old:
        waiting[_question(row)].append(row)
    paired = [_with_old(row, waiting[_question(row)]) for row in new]
    for row in (row for rows in waiting.values() for row in rows):
        paired.append(Row(row.where, {**row.value, "output": "", _OLD: row.value.get("output")}))
    return paired


def _with_old(row: Row, candidates: deque[Row]) -> Row:
    if not candidates:
        return row
    return Row(row.where, {**row.value, _OLD: candidates.popleft().value.get("output")})


def _question(row: Row) -> str:
    return "\n".join(str(row.value.get(name) or "").strip() for name in ("instruction", "input"))
