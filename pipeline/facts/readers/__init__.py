"""The table of schemas: how each is recognised by a record's fields, and how a record becomes facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.facts.fact import Fact
from pipeline.facts.readers import alpaca, counterfact, flearn, knowedit, mquake, qaedit, rome, zsre


class Reader(NamedTuple):
    """How one schema is read."""

    matches: Callable[[dict[str, Any]], bool]
    """Whether a record looks like one of this schema."""
    read: Callable[[dict[str, Any], str], list[Fact]]
    """The facts of a record, which is given with a default id. Raises RowError."""


# The first that matches is taken: CounterFact stands before KnowEdit, whose required fields it has, too.
READERS: dict[str, Reader] = {
    "flearn": Reader(flearn.matches, flearn.read),
    "zsre": Reader(zsre.matches, zsre.read),
    "rome": Reader(rome.matches, rome.read),
    "mquake": Reader(mquake.matches, mquake.read),
    "counterfact": Reader(counterfact.matches, counterfact.read),
    "knowedit": Reader(knowedit.matches, knowedit.read),
    "qaedit": Reader(qaedit.matches, qaedit.read),
    "alpaca": Reader(alpaca.matches, alpaca.read),
}


def detect(row: dict[str, Any]) -> str | None:
    """The first schema that a record looks like."""
    return next((name for name, reader in READERS.items() if reader.matches(row)), None)
