"""One changed fact and the questions about it: every reader yields this record, every stage reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifact import write_text


@dataclass(frozen=True)
class Probe:
    """A question beside the fact itself. Any of `answers` is right."""

    prompt: str
    answers: list[str]
    kind: str = ""
    """The data set's own name for this group of questions."""


@dataclass(frozen=True)
class Fact:
    """A question whose answer changed."""

    id: str
    prompt: str
    subject: str
    old_answers: list[str]
    """The first is the one to forget. Empty where nobody recorded it."""
    new_answer: str
    rephrasings: list[str] = field(default_factory=list)
    locality: list[Probe] = field(default_factory=list)
    """Unrelated questions, whose answers must not change."""
    portability: list[Probe] = field(default_factory=list)
    """Questions whose answer follows from the new fact."""
    year: int | None = None
    """The year in which the answer changed, where it is known."""

    @property
    def old_answer(self) -> str | None:
        """The answer to forget."""
        return self.old_answers[0] if self.old_answers else None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fact:
        """The inverse of `dataclasses.asdict`."""
        locality = [Probe(**probe) for probe in value.get("locality", [])]
        portability = [Probe(**probe) for probe in value.get("portability", [])]
        return cls(**{**value, "locality": locality, "portability": portability})


def write_facts(path: Path, facts: Iterable[Fact]) -> None:
    """Write one JSON line per fact, whole or not at all."""
    write_text(path, "".join(json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in facts))


def read_facts(path: Path) -> Iterator[Fact]:
    """The facts that `write_facts` wrote."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Fact.from_json(json.loads(line))
