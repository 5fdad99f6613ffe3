"""SQuAD's normalisation, and what counts as the same answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate.protocols.generation import contains, is_match, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles.", "beatles"),
        ("  an Apple a day\t", "apple day"),
        ("Nur-Sultan", "nursultan"),
        ("U.S.A.", "usa"),
        ("São Tomé", "são tomé"),
        ("anthem", "anthem"),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize("answer", ["A", "The The", "!!!"])
def test_answer_of_articles_or_punctuation_alone_does_not_match_everything(answer: str) -> None:
    assert is_match(answer, [answer])
    assert contains(answer, [answer])
    assert not is_match("Paris", [answer])
    assert not contains("Paris", [answer])
    assert not is_match("", [answer])


@given(st.text(), st.text(alphabet="xyzé 1.-", min_size=1).filter(lambda text: text.strip(" .-")))
def test_an_answer_matches_and_is_contained(anything: str, words: str) -> None:
    assert is_match(anything, ["something else", anything])
    assert contains(f"It is {words}.", [words])


def test_containment_is_by_whole_words() -> None:
    assert contains("It was moved to Nur-Sultan, in 2019", ["Nur-Sultan"])
    assert contains("the new York City", ["York"])
    assert not contains("Romeo", ["Rome"])
    assert not contains("Paris", [])
    assert contains("Astana", ["Nur-Sultan", "astana"])


def test_exact_match_takes_any_of_the_answers() -> None:
    assert is_match("the euro", ["Kuna", "Euro"])
    assert not is_match("euro coins", ["Euro"])
    assert not is_match("euro", [])
