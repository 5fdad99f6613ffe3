"""Which facts an experiment uses: drop the unusable, resolve contradictions, apply the limit.

The order matters: an unusable fact must not push out one that it contradicts, and `limit` counts facts that
will be used. Every loss is counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from pipeline.config import Facts
from pipeline.errors import InputError
from pipeline.facts.conflicts import Conflict, resolve_conflicts
from pipeline.facts.fact import Fact, Probe


@dataclass
class Selection:
    """The facts that stay, and what became of the others."""

    facts: list[Fact]
    conflicts: list[Conflict]
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of dropped facts, by reason."""
    dropped_probes: Counter[str] = field(default_factory=Counter)
    """Number of dropped locality and portability questions, by reason."""
    num_over_limit: int = 0


def select(facts: list[Fact], config: Facts, needs_old_answer: bool) -> Selection:
    """The facts to use.

    Raises InputError if none is left, or for a contradiction where `config.conflicts` is `error`.
    """
    dropped: Counter[str] = Counter()
    usable = []
    for fact in facts:
        reason = unusable(fact, needs_old_answer)
        if reason:
            dropped[reason] += 1
        else:
            usable.append(fact)
    kept, conflicts = resolve_conflicts(usable, config.conflicts)
    if len(kept) < len(usable):
        dropped["contradiction"] = len(usable) - len(kept)
    if not kept:
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items()) or "the file holds none"
        raise InputError(f"facts.path: no fact is left of {len(facts)} ({reasons}); {_advice(dropped)}")
    limited = kept[: config.limit]
    # Last, for only the facts in use change a locality question's answer.
    cleaned, dropped_probes = clean_probes(limited)
    return Selection(cleaned, conflicts, dropped, dropped_probes, len(kept) - len(limited))


def unusable(fact: Fact, needs_old_answer: bool) -> str | None:
    """Why `fact` cannot be used, if so."""
    if not fact.prompt:
        return "empty_prompt"
    if not fact.new_answer:
        return "empty_new_answer"
    if needs_old_answer and not fact.old_answers:
        return "no_old_answer"
    if _normal(fact.new_answer) in map(_normal, fact.old_answers):
        return "old_equals_new"
    return None


def clean_probes(facts: list[Fact]) -> tuple[list[Fact], Counter[str]]:
    """`facts` without the questions that cannot be scored, and the number of those by reason.

    `no_answer`: the data give none. `edited_question`: another fact changes this locality question's answer,
    so it is not meant to stay (216 of CounterFact's 10,000 facts have such a question).
    """
    edited = {text for fact in facts for text in (fact.prompt, *fact.rephrasings)}
    dropped: Counter[str] = Counter()

    def kept(probes: list[Probe], is_locality: bool) -> list[Probe]:
        reasons = [_unscorable(probe, edited if is_locality else set()) for probe in probes]
        dropped.update(reason for reason in reasons if reason)
        return [probe for probe, reason in zip(probes, reasons, strict=True) if not reason]

    cleaned = [
        replace(fact, locality=kept(fact.locality, True), portability=kept(fact.portability, False))
        for fact in facts
    ]
    return cleaned, dropped


def _unscorable(probe: Probe, edited: set[str]) -> str | None:
    if not probe.answers or not probe.prompt:
        return "no_answer"
    return "edited_question" if probe.prompt in edited else None


def _normal(answer: str) -> str:
    return " ".join(answer.casefold().split())


def _advice(dropped: Counter[str]) -> str:
    if dropped["no_old_answer"]:
        return "forgetting needs old answers: take other data, or a method without forgetting"
    if dropped["contradiction"]:
        return "set facts.conflicts=keep_first, or take other data"
    return "see `flearn facts inspect` for what is in it"
