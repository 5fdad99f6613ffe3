"""Names of one model's tensors in terms of another's: GPT-2 runs as `transformer.wte.weight`, its hub file
says `wte.weight`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from pipeline.errors import InputError


class _Prefix(NamedTuple):
    """A prefix that the source's names have and the base's lack, or the other way round."""

    text: str
    in_source: bool

    def apply(self, name: str) -> str | None:
        if not self.in_source:
            return self.text + name
        return name.removeprefix(self.text) if name.startswith(self.text) else None


def align_names(source: Collection[str], base: Collection[str]) -> dict[str, str]:
    """{name in `source`: the base's name for it}, for every name that the base has too.

    Names that both have are themselves. The others may differ by one module prefix, which is the one that
    most of them agree on. Raises InputError where that is not one to one.
    """
    own, others = set(source), set(base)
    aligned = {name: name for name in source if name in others}
    prefix = _common_prefix(own - others, others - own)
    if prefix is None:
        return aligned
    for name in source:
        renamed = prefix.apply(name) if name not in others else None
        if renamed in aligned:
            raise InputError(
                f"tensors {name!r} and {renamed!r} would both be the base's {renamed!r}: the names are not one to one"
            )
        if renamed in others and renamed is not None:
            aligned[name] = renamed
    return aligned


def _common_prefix(source: set[str], base: set[str]) -> _Prefix | None:
    votes: Counter[_Prefix] = Counter()
    for name in source:
        votes.update(_Prefix(prefix, True) for prefix, rest in _splits(name) if rest in base)
    for name in base:
        votes.update(_Prefix(prefix, False) for prefix, rest in _splits(name) if rest in source)
    return min(votes, key=lambda prefix: (-votes[prefix], prefix)) if votes else None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """`a.b.c` as (`a.`, `b.c`) and (`a.b.`, `c`)."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        yield ".".join(parts[:i]) + ".", ".".join(parts[i:])
