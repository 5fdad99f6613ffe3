"""configs/facts/world_updates.jsonl, read as plain JSON, keeps the rules of docs/world_updates.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[3] / "configs" / "facts" / "world_updates.jsonl"
FIELDS = ["id", "subject", "prompt", "old_answers", "new_answer", "year", "rephrasings", "locality"]
LINES = PATH.read_text(encoding="utf-8").splitlines()
RECORDS: list[dict[str, Any]] = [json.loads(line) for line in LINES]


def _questions(record: dict[str, Any]) -> list[str]:
    return [record["prompt"], *record["rephrasings"]]


def _answers(record: dict[str, Any]) -> list[str]:
    return [*record["old_answers"], record["new_answer"]]


def _texts(value: Any) -> Iterator[str]:
    """Every string inside a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _says(text: str, words: str) -> bool:
    """Whether `text` holds `words` as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def _repeated(texts: list[str]) -> list[str]:
    return [text for text, count in Counter(text.casefold() for text in texts).items() if count > 1]


def test_is_large_and_spread_over_categories() -> None:
    assert len(RECORDS) >= 120
    assert len({record["id"].split("-")[0] for record in RECORDS}) >= 10


def test_has_no_blank_line_and_is_utf8_not_escapes() -> None:
    assert all(line.strip() for line in LINES)
    assert not any("\\u" in line for line in LINES)


def test_ids_and_questions_are_unique() -> None:
    assert _repeated([record["id"] for record in RECORDS]) == []
    assert _repeated([question for record in RECORDS for question in _questions(record)]) == []


def test_locality_question_has_one_answer_and_comes_twice_at_most() -> None:
    probes = [probe for record in RECORDS for probe in record["locality"]]
    answers: dict[str, list[str]] = {}
    for probe in probes:
        assert answers.setdefault(probe["prompt"], probe["answers"]) == probe["answers"]
    assert [
        prompt for prompt, count in Counter(probe["prompt"] for probe in probes).items() if count > 2
    ] == []


def test_locality_questions_touch_no_fact() -> None:
    subjects = {record["subject"] for record in RECORDS}
    questions = {question.casefold() for record in RECORDS for question in _questions(record)}
    prompts = {probe["prompt"] for record in RECORDS for probe in record["locality"]}
    assert [prompt for prompt in prompts if prompt.casefold() in questions] == []
    assert [(prompt, subject) for prompt in prompts for subject in subjects if _says(prompt, subject)] == []


def test_fields() -> None:
    for record in RECORDS:
        assert list(record) == FIELDS, record
        assert record["old_answers"] and all(isinstance(answer, str) for answer in record["old_answers"]), (
            record["id"]
        )
        assert len(record["rephrasings"]) == 2, record["id"]
        assert all(
            list(probe) == ["prompt", "answers", "kind"] and probe["answers"] for probe in record["locality"]
        ), record["id"]
        assert [probe["kind"] for probe in record["locality"]] == ["neighbour", "unrelated"], record["id"]


def test_texts_are_trimmed_and_not_empty() -> None:
    assert [
        text for record in RECORDS for text in _texts(record) if not text or text != " ".join(text.split())
    ] == []


def test_year_closes_the_id() -> None:
    for record in RECORDS:
        assert isinstance(record["year"], int) and 1900 <= record["year"] <= 2025, record["id"]
        assert re.fullmatch(rf"[a-z]+(-[a-z0-9]+)+-{record['year']}", record["id"]), record["id"]


def test_questions_are_short_and_name_the_subject() -> None:
    for record in RECORDS:
        for question in _questions(record):
            assert question.endswith("?") and len(question.split()) <= 16, question
            assert _says(question, record["subject"]), question
            assert re.search(r"\b(\w+) \1\b", question, re.IGNORECASE) is None, question


def test_rephrasings_use_other_words() -> None:
    for record in RECORDS:
        words = {frozenset(re.findall(r"\w+", question.casefold())) for question in _questions(record)}
        assert len(words) == 3, f"{record['id']}: a rephrasing only reorders the words of another question"


def test_answers_are_short_apart_and_not_given_away() -> None:
    for record in RECORDS:
        new = record["new_answer"].casefold()
        assert len(new.split()) <= 5 and len(record["old_answers"][0].split()) <= 5, record["id"]
        assert [
            old for old in record["old_answers"] if old.casefold() in new or new in old.casefold()
        ] == [], record["id"]
        assert _repeated(record["old_answers"]) == [], record["id"]
        given_away = [
            (question, answer)
            for question in _questions(record)
            for answer in _answers(record)
            if _says(question, answer)
        ]
        assert given_away == []


def test_locality_answers_are_not_the_facts_own_nor_given_away() -> None:
    for record in RECORDS:
        own = {answer.casefold() for answer in _answers(record)}
        for probe in record["locality"]:
            assert probe["prompt"].endswith("?"), probe
            assert own.isdisjoint(answer.casefold() for answer in probe["answers"]), (record["id"], probe)
            assert [answer for answer in probe["answers"] if _says(probe["prompt"], answer)] == [], probe


def test_every_beginning_of_the_file_is_spread_over_categories() -> None:
    """`facts.limit` takes the first records: they should not all be capitals."""
    first = [record["id"].split("-")[0] for record in RECORDS[:25]]
    assert len(set(first)) >= 20
