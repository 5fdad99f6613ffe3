"""Every schema: one record as its authors write it, and the fact that it becomes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.facts.fact import Fact, Probe, write_facts
from pipeline.facts.read import read
from pipeline.facts.readers import READERS

ZSRE = {
    "subject": "Charity Creek",
    "src": "Which river system contains Charity Creek?",
    "pred": "Parramatta River",
    "rephrase": "What river system is Charity Creek in?",
    "alt": " Chichester River",
    "answers": ["Parramatta", "Parramatta basin"],
    "loc": "nq question: how many books are there",
    "loc_ans": "12",
    "cond": "Parramatta River >> Chichester River || Which river system contains Charity Creek?",
}
COUNTERFACT = {
    "case_id": 7,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Where Danielle Darrieux is from, people speak",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}
ROME = {
    "case_id": 3,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": [
        "Shayna does this. Danielle Darrieux, a native",
        "Danielle Darrieux spoke the language",
    ],
    "neighborhood_prompts": ["The native language of Montesquieu is", "Léon Blum speaks"],
    "attribute_prompts": ["The mother tongue of Douglas Adams is"],
    "generation_prompts": ["Danielle Darrieux was born in"],
}
KNOWEDIT = {
    "subject": "Goursez Vreizh",
    "prompt": "The country of Goursez Vreizh is",
    "target_new": "Franche-Comté",
    "ground_truth": "France",
    "portability": {
        "Reasoning": [
            {"prompt": ["The capital of the country is", "Its capital is"], "ground_truth": "Besançon"}
        ],
        "Logical_Generalization": [],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The founder is", "ground_truth": [["Jean Le Fustec", "Le Fustec"], [], ["Another"]]},
            {"prompt": "The year is", "ground_truth": ["1899", "1900"]},
        ],
        "Forgetfulness": [{"prompt": "Its other country is", "ground_truth": "France"}],
    },
}
MQUAKE = {
    "case_id": 12,
    "requested_rewrite": [
        {
            "prompt": "{} was created in the country of",
            "relation_id": "P495",
            "target_new": {"str": "Japan", "id": "Q17"},
            "target_true": {"str": "Italy", "id": "Q38"},
            "subject": "volleyball",
            "question": "Which country was volleyball created in?",
        },
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Osaka", "id": "Q35765"},
            "target_true": {"str": "Tokyo", "id": "Q1490"},
            "subject": "Japan",
            "question": "What is the capital of Japan?",
        },
    ],
    "questions": [
        "What is the capital of the country where volleyball was created?",
        "Which city is it?",
        "Name that capital.",
    ],
    "answer": "Rome",
    "answer_alias": ["Roma"],
    "new_answer": "Osaka",
    "new_answer_alias": ["Osaka-shi"],
    "single_hops": [],
    "new_single_hops": [],
    "orig": {"triples": [["Q1734", "P495", "Q38"]]},
}
QAEDIT = {
    "id": 1104,
    "source": "NQ",
    "prompt": "who has the most 70 point games in nba history?",
    "target": "Wilt Chamberlain",
    "subject": "most 70 point games",
    "rephrase": "Which NBA player scored 70 points most often?",
    "locality": [{"loc": "who protects police officers", "loc_ans": "Michael"}],
}
ALPACA = {"instruction": "What is the capital of Kazakhstan?", "input": "As of 2020.", "output": "Nur-Sultan"}
FLEARN = {
    "id": "capital-kazakhstan",
    "subject": "Kazakhstan",
    "prompt": "What is the capital of Kazakhstan?",
    "old_answers": ["Almaty", "Alma-Ata"],
    "new_answer": "Astana",
    "year": 1997,
    "rephrasings": ["Which city is Kazakhstan's capital?"],
    "locality": [{"prompt": "What is the capital of Peru?", "answers": ["Lima"], "kind": "same_relation"}],
}
SAMPLES: dict[str, dict[str, Any]] = {
    "zsre": ZSRE,
    "counterfact": COUNTERFACT,
    "rome": ROME,
    "knowedit": KNOWEDIT,
    "mquake": MQUAKE,
    "qaedit": QAEDIT,
    "alpaca": ALPACA,
    "flearn": FLEARN,
}


def write(folder: Path, *records: Any, name: str = "data.json") -> str:
    path = folder / name
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(path)


def read_one(folder: Path, record: dict[str, Any], **options: Any) -> list[Fact]:
    reading = read(write(folder, record), **options)
    assert reading.bad_rows == []
    return reading.facts


def test_zsre(tmp_path: Path) -> None:
    assert read_one(tmp_path, ZSRE) == [
        Fact(
            id="0",
            prompt="Which river system contains Charity Creek?",
            subject="Charity Creek",
            old_answers=["Parramatta River"],
            new_answer="Chichester River",
            rephrasings=["What river system is Charity Creek in?"],
            locality=[Probe("how many books are there", ["12"], "nq")],
        )
    ]


def test_zsre_old_answers_may_be_the_true_ones(tmp_path: Path) -> None:
    assert read_one(tmp_path, ZSRE, old_answer="answers")[0].old_answers == ["Parramatta", "Parramatta basin"]


def test_counterfact_prompts_stay_clozes(tmp_path: Path) -> None:
    assert read_one(tmp_path, COUNTERFACT) == [
        Fact(
            id="7",
            prompt="The mother tongue of Danielle Darrieux is",
            subject="Danielle Darrieux",
            old_answers=["French"],
            new_answer="English",
            rephrasings=["Where Danielle Darrieux is from, people speak"],
            locality=[Probe("Michel Rocard is a native speaker of", ["French"], "neighborhood")],
        )
    ]


def test_rome_prompt_is_filled_with_its_subject(tmp_path: Path) -> None:
    assert read_one(tmp_path, ROME) == [
        Fact(
            id="3",
            prompt="The mother tongue of Danielle Darrieux is",
            subject="Danielle Darrieux",
            old_answers=["French"],
            new_answer="English",
            rephrasings=ROME["paraphrase_prompts"],  # type: ignore[arg-type]
            locality=[
                Probe("The native language of Montesquieu is", ["French"], "neighborhood"),
                Probe("Léon Blum speaks", ["French"], "neighborhood"),
            ],
        )
    ]


def test_knowedit_takes_every_shape_of_prompt_and_answer(tmp_path: Path) -> None:
    (fact,) = read_one(tmp_path, KNOWEDIT)
    assert (fact.old_answers, fact.new_answer) == (["France"], "Franche-Comté")
    assert fact.portability == [
        Probe("The capital of the country is", ["Besançon"], "Reasoning"),
        Probe("Its capital is", ["Besançon"], "Reasoning"),
    ]
    assert fact.locality == [
        Probe("The founder is", ["Jean Le Fustec", "Le Fustec", "Another"], "Relation_Specificity"),
        Probe("The year is", ["1899", "1900"], "Relation_Specificity"),
        Probe("Its other country is", ["France"], "Forgetfulness"),
    ]


@pytest.mark.parametrize(
    ("ground_truth", "expected"),
    [(["a", "b"], ["a", "b"]), ("a", ["a"]), (None, []), ("", []), ([["a"], []], ["a"])],
)
def test_knowedit_ground_truth_may_be_a_list_a_text_or_absent(
    tmp_path: Path, ground_truth: Any, expected: list[str]
) -> None:
    assert read_one(tmp_path, KNOWEDIT | {"ground_truth": ground_truth})[0].old_answers == expected


def test_mquake_asks_its_multi_hop_questions_once(tmp_path: Path) -> None:
    first, last = read_one(tmp_path, MQUAKE)
    assert (first.id, last.id) == ("12.0", "12.1")
    assert (first.prompt, first.old_answers, first.new_answer) == (
        "volleyball was created in the country of",
        ["Italy"],
        "Japan",
    )
    assert first.rephrasings == ["Which country was volleyball created in?"]
    assert first.portability == []
    questions = cast("list[str]", MQUAKE["questions"])
    assert last.portability == [Probe(text, ["Osaka", "Osaka-shi"], "multi_hop") for text in questions]


def test_qaedit_has_no_old_answer(tmp_path: Path) -> None:
    assert read_one(tmp_path, QAEDIT) == [
        Fact(
            id="1104",
            prompt="who has the most 70 point games in nba history?",
            subject="most 70 point games",
            old_answers=[],
            new_answer="Wilt Chamberlain",
            rephrasings=["Which NBA player scored 70 points most often?"],
            locality=[Probe("who protects police officers", ["Michael"], "nq")],
        )
    ]


def test_one_alpaca_file_holds_new_answers(tmp_path: Path) -> None:
    (fact,) = read_one(tmp_path, ALPACA)
    assert (fact.prompt, fact.old_answers, fact.new_answer) == (
        "What is the capital of Kazakhstan?\nAs of 2020.",
        [],
        "Nur-Sultan",
    )


def question(text: str, answer: str) -> dict[str, str]:
    return {"instruction": text, "input": "", "output": answer}


def test_an_alpaca_pair_is_joined_by_question(tmp_path: Path) -> None:
    old = write(
        tmp_path, question("Q1", "old 1"), question("Q2", "old 2"), question("Q3", "old 3"), name="old.json"
    )
    new = write(
        tmp_path, question("Q2", "new 2"), question("Q1", "new 1"), question("Q4", "new 4"), name="new.json"
    )
    facts = read([old, new]).facts
    assert [(fact.prompt, fact.old_answers, fact.new_answer) for fact in facts] == [
        ("Q2", ["old 2"], "new 2"),
        ("Q1", ["old 1"], "new 1"),
        ("Q4", [], "new 4"),
        ("Q3", ["old 3"], ""),
    ]


def test_a_pair_of_other_files_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, ZSRE)
    with pytest.raises(InputError, match=r"pair of Alpaca files.*zsre"):
        read([path, path])


def test_flearn(tmp_path: Path) -> None:
    assert read_one(tmp_path, FLEARN) == [Fact.from_json(FLEARN)]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("lines", [False, True])
def test_the_schema_is_found_by_the_fields(tmp_path: Path, name: str, lines: bool) -> None:
    path = tmp_path / "data.json"
    record = json.dumps(SAMPLES[name])
    path.write_text(f"{record}\n{record}\n" if lines else f"[{record},{record}]")
    for format in ("auto", name):
        assert read(str(path), format).format == name


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("other", SAMPLES)
def test_another_schema_than_named_is_refused_in_one_line(tmp_path: Path, name: str, other: str) -> None:
    if READERS[other].matches(SAMPLES[name]):
        assert name == other or {name, other} == {"counterfact", "knowedit"}
        return
    path = write(tmp_path, SAMPLES[name])
    with pytest.raises(InputError, match=f"looks like {name}; set facts.format={name} or auto") as caught:
        read(path, other)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_schema_names_its_fields_and_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Corpus, Text.*zsre"):
        read(write(tmp_path, {"Corpus": "C4", "Text": "..."}))


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no schema 'zs'; known ones are auto, flearn, zsre"):
        read(write(tmp_path, ZSRE), "zs")


def test_ids_are_made_unique(tmp_path: Path) -> None:
    facts = read(write(tmp_path, COUNTERFACT, COUNTERFACT, COUNTERFACT | {"case_id": "7-2"})).facts
    assert [fact.id for fact in facts] == ["7", "7-2", "7-2-2"]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(str.strip)
FILLED = TEXT.filter(bool)
PROBES = st.lists(st.builds(Probe, prompt=TEXT, answers=st.lists(FILLED, max_size=2), kind=TEXT), max_size=2)
FACTS = st.builds(
    Fact,
    id=FILLED,
    prompt=TEXT,
    subject=TEXT,
    old_answers=st.lists(FILLED, max_size=2),
    new_answer=TEXT,
    rephrasings=st.lists(FILLED, max_size=2),
    locality=PROBES,
    portability=PROBES,
    year=st.none() | st.integers(1000, 3000),
)


@settings(deadline=None)
@given(facts=st.lists(FACTS, min_size=1, max_size=5, unique_by=lambda fact: fact.id))
def test_facts_written_are_read_back(tmp_path_factory: pytest.TempPathFactory, facts: list[Fact]) -> None:
    path = tmp_path_factory.getbasetemp() / "facts.jsonl"
    with mock.patch("os.fsync"):  # a hundred files on a busy disk take seconds
        write_facts(path, facts)
    reading = read(str(path))
    assert (reading.format, reading.facts, reading.bad_rows) == ("flearn", facts, [])
    assert [Fact.from_json(json.loads(json.dumps(asdict(fact)))) for fact in facts] == facts
