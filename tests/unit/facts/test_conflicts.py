"""Contradictions: each kind is found, and no policy leaves one behind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.facts.conflicts import count_conflicts, find_conflicts, resolve_conflicts
from pipeline.facts.fact import Fact


def fact(prompt: str, new: str, old: str = "", subject: str = "", rephrasings: tuple[str, ...] = ()) -> Fact:
    return Fact(prompt, prompt, subject, [old] if old else [], new, list(rephrasings))


PAIRS = {
    "same_prompt": [fact("q", "a"), fact("q", "b")],
    "rephrasing_is_a_prompt": [fact("q", "a"), fact("p", "b", rephrasings=("q",))],
    "same_rephrasing": [fact("q", "a", rephrasings=("r",)), fact("p", "b", rephrasings=("r",))],
    "same_subject_and_old_answer": [fact("q", "a", "old", "s"), fact("p", "b", "old", "s")],
}


@pytest.mark.parametrize("kind", PAIRS)
def test_each_kind_is_found(kind: str) -> None:
    bystander = fact("other", "c", "old", "another subject")
    conflicts = find_conflicts([PAIRS[kind][0], bystander, PAIRS[kind][1]])
    assert [(conflict.kind, conflict.facts) for conflict in conflicts] == [(kind, [0, 2])]


@pytest.mark.parametrize("kind", PAIRS)
def test_the_policies(kind: str) -> None:
    first, second = PAIRS[kind]
    bystander = fact("other", "c")
    assert resolve_conflicts([first, bystander, second], "drop")[0] == [bystander]
    assert resolve_conflicts([first, bystander, second], "keep_first")[0] == [first, bystander]
    with pytest.raises(
        InputError, match=f"2 of 3 facts contradict another \\({kind} 2\\).*'q' -> 'a'.*drop or keep_first"
    ):
        resolve_conflicts([first, bystander, second], "error")


def test_agreement_is_no_conflict() -> None:
    facts = [fact("q", "a", "old", "s", ("r",)), fact("q", "a", "old", "s", ("r", "q")), fact("r", "a")]
    assert resolve_conflicts(facts, "error") == (facts, [])


def test_no_subject_or_no_old_answer_is_shared_by_none() -> None:
    assert (
        find_conflicts(
            [fact("q", "a", "old"), fact("p", "b", "old"), fact("x", "a", "", "s"), fact("y", "b", "", "s")]
        )
        == []
    )


def test_counts_are_of_groups_and_of_facts() -> None:
    facts = [fact("q", "a"), fact("q", "b"), fact("q", "b"), fact("p", "a"), fact("p", "c")]
    assert count_conflicts(find_conflicts(facts)) == {"same_prompt": {"num_groups": 2, "num_facts": 5}}


LETTERS = st.sampled_from("xyz")
FACTS = st.lists(
    st.builds(
        fact,
        prompt=LETTERS,
        new=st.sampled_from("ab"),
        old=st.sampled_from(["", "o", "p"]),
        subject=st.sampled_from(["", "s", "t"]),
        rephrasings=st.lists(st.sampled_from("xyzuvw"), max_size=2).map(tuple),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(facts=FACTS)
def test_no_policy_leaves_a_contradiction_behind(facts: list[Fact]) -> None:
    for policy in ("drop", "keep_first"):
        kept, _ = resolve_conflicts(facts, policy)  # type: ignore[arg-type]
        assert find_conflicts(kept) == []


@settings(deadline=None)
@given(facts=FACTS)
def test_each_policy_removes_no_more_than_it_says(facts: list[Fact]) -> None:
    def contradicts(one: Fact, other: Fact) -> bool:
        asked = [{"q:" + text for text in (f.prompt, *f.rephrasings)} for f in (one, other)]
        changed = [
            {f"{f.subject}|{f.old_answer}"} if f.subject and f.old_answer else set() for f in (one, other)
        ]
        return one.new_answer != other.new_answer and bool((asked[0] & asked[1]) | (changed[0] & changed[1]))

    alone = [f for f in facts if not any(contradicts(f, other) for other in facts)]
    assert resolve_conflicts(facts, "drop")[0] == alone
    expected: list[Fact] = []
    for f in facts:
        expected += [f] if not any(contradicts(f, other) for other in expected) else []
    assert resolve_conflicts(facts, "keep_first")[0] == expected
