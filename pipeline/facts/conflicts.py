"""Contradictions: facts that ask the same thing and give different new answers.

A sixth of ZsRE is so. A model cannot learn both answers, and the one it does not learn counts as a failure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from pipeline.errors import InputError
from pipeline.facts.fact import Fact

Policy = Literal["drop", "keep_first", "error"]

_Groups = dict[str, list[int]]
"""Positions of the facts that share a text."""


class Conflict(NamedTuple):
    """Facts (by their positions) that share `key` and disagree about the new answer."""

    kind: str
    key: str
    facts: list[int]


def find_conflicts(facts: list[Fact]) -> list[Conflict]:
    """Every contradiction among `facts`, of four kinds; a fact may be in several.

    - `same_prompt`, `same_rephrasing`: the facts share that text.
    - `rephrasing_is_a_prompt`: one fact's rephrasing is another one's prompt.
    - `same_subject_and_old_answer`: the same question in other words.
    """
    prompts = _group(facts, lambda fact: [fact.prompt])
    rephrasings = _group(facts, lambda fact: fact.rephrasings)
    changes = _group(facts, _changes)
    return [
        *_disagreeing("same_prompt", prompts, facts),
        *_across(rephrasings, prompts, facts),
        *_disagreeing("same_rephrasing", rephrasings, facts),
        *_disagreeing("same_subject_and_old_answer", changes, facts),
    ]


def resolve_conflicts(facts: list[Fact], policy: Policy) -> tuple[list[Fact], list[Conflict]]:
    """The facts that stay under `policy`, in order, and all contradictions found.

    `drop` removes every fact of a contradiction. `keep_first` removes a fact that contradicts an earlier kept
    one. `error` raises InputError if there is any contradiction.
    """
    conflicts = find_conflicts(facts)
    if not conflicts:
        return facts, []
    if policy == "error":
        raise InputError(
            f"facts.conflicts=error: {_describe(conflicts, facts)}; set facts.conflicts to drop or keep_first"
        )
    if policy == "keep_first":
        return list(_first_of_each(facts)), conflicts
    dropped = {i for conflict in conflicts for i in conflict.facts}
    return [fact for i, fact in enumerate(facts) if i not in dropped], conflicts


def count_conflicts(conflicts: list[Conflict]) -> dict[str, dict[str, int]]:
    """For each kind: `num_groups` of facts that disagree, and `num_facts` in them."""
    num_groups: dict[str, int] = defaultdict(int)
    members: dict[str, set[int]] = defaultdict(set)
    for conflict in conflicts:
        num_groups[conflict.kind] += 1
        members[conflict.kind].update(conflict.facts)  # a set: one fact may be in several groups of a kind
    return {kind: {"num_groups": num_groups[kind], "num_facts": len(members[kind])} for kind in num_groups}


def _changes(fact: Fact) -> list[str]:
    """The key of "the same thing asked in other words"; none where subject or old answer is unknown."""
    return [f"{fact.subject} | {fact.old_answer}"] if fact.subject and fact.old_answer else []


def _group(facts: list[Fact], keys: Callable[[Fact], list[str]]) -> _Groups:
    groups: _Groups = defaultdict(list)
    for i, fact in enumerate(facts):
        for key in dict.fromkeys(keys(fact)):  # a fact may repeat a rephrasing: count it once
            groups[key].append(i)
    return groups


def _disagreeing(kind: str, groups: _Groups, facts: list[Fact]) -> Iterator[Conflict]:
    for key, members in groups.items():
        if len({facts[i].new_answer for i in members}) > 1:
            yield Conflict(kind, key, members)


def _across(rephrasings: _Groups, prompts: _Groups, facts: list[Fact]) -> Iterator[Conflict]:
    # Pairs are compared, not the whole group: two facts that share only the rephrasing are another kind.
    for text, rephrased in rephrasings.items():
        members: set[int] = set()
        for i in rephrased:
            for j in prompts.get(text, []):
                if facts[i].new_answer != facts[j].new_answer:
                    members |= {i, j}
        if members:
            yield Conflict("rephrasing_is_a_prompt", text, sorted(members))


def _first_of_each(facts: list[Fact]) -> Iterator[Fact]:
    """The facts that contradict no earlier kept one."""
    claimed: dict[tuple[str, str], str] = {}
    for fact in facts:
        questions = [("question", text) for text in (fact.prompt, *fact.rephrasings)]
        keys = questions + [("change", change) for change in _changes(fact)]
        # A dropped fact claims nothing: it must not push out later ones.
        if all(claimed.get(key, fact.new_answer) == fact.new_answer for key in keys):
            claimed.update(dict.fromkeys(keys, fact.new_answer))
            yield fact


def _describe(conflicts: list[Conflict], facts: list[Fact]) -> str:
    members = {i for conflict in conflicts for i in conflict.facts}
    kinds = ", ".join(f"{kind} {count['num_facts']}" for kind, count in count_conflicts(conflicts).items())
    first = conflicts[0].facts[0]
    other = next(i for i in conflicts[0].facts if facts[i].new_answer != facts[first].new_answer)
    example = " and ".join(f"{facts[i].prompt!r} -> {facts[i].new_answer!r}" for i in (first, other))
    return f"{len(members)} of {len(facts)} facts contradict another ({kinds}), for example {example}"
