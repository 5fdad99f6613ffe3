"""One fact that changed, with what is asked about it: the record that every reader yields and every stage
reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifact import write_text


@dataclass(frozen=True)
class Probe:
    """A question beside the fact itself. Any of `answers` is right; `kind` is the source's own name for the
    group.
    """

    prompt: str
    answers: list[str]
    kind: str = ""


@dataclass(frozen=True)
class Fact:
    """A question whose answer changed. `old_answers` may be empty (nobody recorded it); its first entry is
    the one to forget.
    """

    id: str
    prompt: str
    subject: str
    old_answers: list[str]
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
        return self.old_answers[0] if self.old_answers else None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fact:
        """The inverse of `dataclasses.asdict`."""
        probes = {
            name: [Probe(**probe) for probe in value.get(name, [])] for name in ("locality", "portability")
        }
        return cls(**{**value, **probes})


def write_facts(path: Path, facts: Iterable[Fact]) -> None:
    """Write one JSON line per fact, whole or not at all."""
    write_text(path, "".join(json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in facts))


def read_facts(path: Path) -> Iterator[Fact]:
    """The facts that `write_facts` wrote."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Fact.from_json(json.loads(line))
