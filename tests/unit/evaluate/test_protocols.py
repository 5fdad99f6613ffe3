"""What each protocol's scores mean, on outputs made up by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.evaluate.outputs import Forced, Outputs
from pipeline.evaluate.protocols import generation, probability, token
from pipeline.facts.fact import Fact, Probe

EDIT, REPHRASED, OTHER = "What is the capital?", "Capital?", "Which city is the capital?"
NEIGHBOURS = ["The capital of Persia is", "The capital of Media is", "The capital of Lydia is"]

FACT = Fact(
    id="1",
    prompt=EDIT,
    subject="Kazakhstan",
    old_answers=["Nur-Sultan", "Akmola"],
    new_answer="Astana",
    rephrasings=[REPHRASED, OTHER],
    locality=[Probe(question, ["Nur-Sultan"], "neighborhood") for question in NEIGHBOURS],
    portability=[
        Probe("Where does the president live?", ["Astana", "in the capital"]),
        Probe("Unanswered?", []),
    ],
)
WITHOUT_OLD = Fact(
    id="2", prompt=EDIT, subject="", old_answers=[], new_answer="Astana", locality=[Probe("Who?", [])]
)


def forced(argmax: list[int], logprob: float = -1.0, targets: tuple[int, ...] = (1, 2, 3, 4)) -> Forced:
    return Forced(list(targets[: len(argmax)]), argmax, logprob)


TOKEN_OUTPUTS = Outputs(
    forced={
        (EDIT, "Astana"): forced([1, 2, 0, 0]),
        (EDIT, "Nur-Sultan"): forced([1, 2, 3]),
        (REPHRASED, "Astana"): forced([1, 2, 3, 4]),
        (OTHER, "Astana"): forced([0, 0, 0, 4]),
        (NEIGHBOURS[0], "Nur-Sultan"): forced([7, 8, 9, 9]),
        (NEIGHBOURS[1], "Nur-Sultan"): forced([1, 2]),
        (NEIGHBOURS[2], "Nur-Sultan"): forced([5]),
        ("Where does the president live?", "Astana"): forced([1, 0]),
    }
)


def test_token_scores() -> None:
    before = {"locality_argmax": [[7, 8, 8, 8], [1, 2], [6]]}
    result = token.score(FACT, TOKEN_OUTPUTS, before)
    assert result["scores"] == {
        "reliability": 0.5,
        "generality": pytest.approx((1 + 0.25) / 2),
        "locality": pytest.approx((0.5 + 1 + 0) / 3),
        "portability": 0.5,
        "leakage": 1.0,
        "old_reliability": 1.0,
    }
    assert result["locality_argmax"] == [[7, 8, 9, 9], [1, 2], [5]]
    assert set(token.pairs(FACT)) == set(TOKEN_OUTPUTS.forced)


def test_token_leakage_needs_every_token_of_the_old_answer() -> None:
    outputs = Outputs(forced={**TOKEN_OUTPUTS.forced, (EDIT, "Nur-Sultan"): forced([1, 2, 0])})
    scores = token.score(FACT, outputs, None)["scores"]
    assert (scores["leakage"], scores["old_reliability"]) == (0.0, pytest.approx(2 / 3))


def test_token_locality_of_the_original_with_itself_is_whole_and_absent_without_reference() -> None:
    original = token.score(FACT, TOKEN_OUTPUTS, None)
    assert original["scores"]["locality"] is None
    assert token.score(FACT, TOKEN_OUTPUTS, original)["scores"]["locality"] == 1


def test_token_scores_that_do_not_exist_are_none() -> None:
    outputs = Outputs(forced={(EDIT, "Astana"): forced([1, 2])})
    assert list(token.pairs(WITHOUT_OLD)) == [(EDIT, "Astana")]
    scores = token.score(WITHOUT_OLD, outputs, {"locality_argmax": []})["scores"]
    absent = dict.fromkeys(("generality", "locality", "portability", "leakage", "old_reliability"))
    assert scores == {"reliability": 1.0, **absent}


def probability_outputs() -> Outputs:
    new = {
        EDIT: -1.0,
        REPHRASED: -2.0,
        OTHER: -0.5,
        NEIGHBOURS[0]: -3.0,
        NEIGHBOURS[1]: -1.0,
        NEIGHBOURS[2]: -2.0,
    }
    old = {
        EDIT: -1.5,
        REPHRASED: -1.9,
        OTHER: -0.6,
        NEIGHBOURS[0]: -2.0,
        NEIGHBOURS[1]: -1.0,
        NEIGHBOURS[2]: -2.5,
    }
    return Outputs(
        forced={(question, "Astana"): forced([1], value) for question, value in new.items()}
        | {(question, "Nur-Sultan"): forced([1], value) for question, value in old.items()}
    )


def test_probability_scores() -> None:
    outputs = probability_outputs()
    assert set(probability.pairs(FACT)) == set(outputs.forced)
    result = probability.score(FACT, outputs, None)
    assert result["scores"] == {
        "reliability": 1.0,
        "generality": 0.5,
        "locality": pytest.approx(1 / 3),  # a tie is no preference
        "portability": None,
        "leakage": 0.0,
        "old_reliability": 0.0,
    }
    assert result["logprobs"] == [{"new": -1.0, "old": -1.5}]
    assert result["rephrasings"][0] == {"new": -2.0, "old": -1.9}
    assert len(result["neighbours"]) == 3


def test_probability_without_old_answer_or_neighbours() -> None:
    assert list(probability.pairs(WITHOUT_OLD)) == []
    assert set(probability.score(WITHOUT_OLD, Outputs(), None)["scores"].values()) == {None}
    unrelated = Fact("3", EDIT, "", ["Nur-Sultan"], "Astana", locality=[Probe("Who?", ["Nur-Sultan"], "nq")])
    scores = probability.score(unrelated, probability_outputs(), None)["scores"]
    assert (scores["locality"], scores["generality"], scores["reliability"]) == (None, None, 1.0)


def said(**changed: str) -> Outputs:
    texts = {
        "edit": "Astana.",
        "rephrased": "It is Astana",
        "other": "Nur-Sultan",
        "first": "Susa",
        "president": "in The Capital",
        **changed,
    }
    questions = {
        "edit": EDIT,
        "rephrased": REPHRASED,
        "other": OTHER,
        "first": NEIGHBOURS[0],
        "president": "Where does the president live?",
    }
    rest = {NEIGHBOURS[1]: "Ecbatana", NEIGHBOURS[2]: "Sardis", "Unanswered?": "No."}
    return Outputs(generated={questions[name]: text for name, text in texts.items()} | rest)


def test_generation_scores() -> None:
    before = {"locality": ["the Susa!", "Ecbatana", "Lydia"]}
    result = generation.score(FACT, said(), before)
    assert set(generation.questions(FACT)) == set(said().generated)
    assert result["scores"] == {
        "reliability": 1.0,
        "reliability_contains": 1.0,
        "generality": 0.0,
        "generality_contains": 0.5,
        "locality": pytest.approx(2 / 3),
        "portability": 1.0,
        "portability_contains": 1.0,
        "leakage": 0.0,
        "old_reliability": 0.0,
        "old_reliability_contains": 0.0,
    }
    assert result["answer"] == "Astana."
    assert result["rephrasings"] == ["It is Astana", "Nur-Sultan"]
    assert result["locality"] == ["Susa", "Ecbatana", "Sardis"]


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("Nur-Sultan", True),
        ("It was renamed to akmola, I think", True),
        ("Nur-Sultan, now Astana", False),
        ("Astana", False),
        ("Almaty", False),
        ("Akmolastan", False),
    ],
)
def test_generation_leakage(text: str, leaks: bool) -> None:
    assert generation.score(FACT, said(edit=text), None)["scores"]["leakage"] == leaks


@pytest.mark.parametrize(
    ("old", "new", "text", "leaks"),
    [
        (["Prince Charles"], "Charles", "Prince Charles", True),
        (["Prince Charles"], "Charles", "Charles", False),
        (["Prince Charles"], "Charles", "Charles, once Prince Charles", False),
        (["Charles"], "Prince Charles", "Prince Charles", False),
        (["The Beatles"], "Beatles", "The Beatles", False),
    ],
)
def test_generation_leakage_where_one_answer_is_part_of_the_other(
    old: list[str], new: str, text: str, leaks: bool
) -> None:
    assert generation.gives_old(text, Fact("1", EDIT, "", old, new)) == leaks


def test_generation_scores_that_do_not_exist_are_none() -> None:
    outputs = Outputs(generated={EDIT: "Astana", "Who?": "I"})
    scores: dict[str, Any] = generation.score(WITHOUT_OLD, outputs, None)["scores"]
    assert {name for name, value in scores.items() if value is not None} == {
        "reliability",
        "reliability_contains",
    }
    assert generation.score(WITHOUT_OLD, outputs, {"locality": ["i"]})["scores"]["locality"] == 1
