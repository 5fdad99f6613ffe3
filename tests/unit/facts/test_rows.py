"""Malformed data: each bad record by line, with the reason; and one clear line for what is no data at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.facts.read import read, refuse_bad_rows
from pipeline.facts.rows import read_rows

GOOD: dict[str, Any] = {"prompt": "Q?", "new_answer": "new", "old_answers": ["old"]}


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "data.jsonl"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def problems(path: str, format: str = "auto") -> list[tuple[str, str]]:
    return [(row.where, row.reason) for row in read(path, format).bad_rows]


def test_bad_json_lines_are_named_by_line(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD), "", "{not json", "[1, 2]", json.dumps({"prompt": "Q?"}), json.dumps(GOOD)]
    bad = dict(problems(write(tmp_path, "\n".join(lines))))
    assert bad.keys() == {"line 3", "line 4", "line 5"}
    assert bad["line 3"].startswith("not JSON")
    assert "found a list" in bad["line 4"]
    assert bad["line 5"] == "no field 'new_answer'"


def test_bad_records_of_an_array_are_named_by_number_and_line(tmp_path: Path) -> None:
    text = """[
  {"prompt": "Q?", "new_answer": "a"},
  {
    "prompt": "Q?",
    "new_answer": 7
  },

  "text", {"prompt": "Q?", "new_answer": ["a"]}
]"""
    assert sorted(problems(write(tmp_path, text))) == [
        ("record 1 (line 3)", "new_answer: expected text, found a number"),
        ("record 2 (line 8)", "expected an object with named fields, found text"),
        ("record 3 (line 8)", "new_answer: expected text, found a list"),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"old_answer": "x"}, "old_answer: unknown field; did you mean old_answers?"),
        ({"old_answers": [1]}, "old_answers: expected text, found a number"),
        ({"prompt": None}, "no field 'prompt'"),
        ({"year": "1997"}, "year: expected a whole number"),
        (
            {"locality": [{"prompt": "Q", "answer": "a"}]},
            "locality[0].answer: unknown field; did you mean answers?",
        ),
        ({"locality": ["Q"]}, "locality[0]: expected an object with named fields, found text"),
        ({"locality": "Q"}, "locality: expected a list, found text"),
        ({"new_answer": "\ud800"}, "new_answer: holds half of a surrogate pair, which is no character"),
    ],
)
def test_the_reason_names_the_field(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = write(tmp_path, f"{json.dumps(GOOD)}\n{json.dumps(GOOD | change)}")
    assert problems(path) == [("line 2", reason)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"src": "Q", "alt": None}, "no field 'alt'"),
        (
            {"requested_rewrite": {"prompt": "{} is", "subject": "X"}},
            "target_true: expected an object with named fields, found null",
        ),
        ({"requested_rewrite": []}, "requested_rewrite is empty"),
        (
            {"prompt": "Q", "target_new": "a", "locality": {"A": "x"}},
            "locality.A: expected a list, found text",
        ),
        (
            {"prompt": "Q", "target_new": "a", "portability": [], "locality": ["x"]},
            "locality: expected an object with named fields, found a list",
        ),
    ],
)
def test_malformed_records_of_published_schemas(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    assert problems(write(tmp_path, json.dumps([record]))) == [("record 0 (line 1)", reason)]


def test_refusal_lists_the_first_and_counts_all(tmp_path: Path) -> None:
    reading = read(write(tmp_path, "\n".join([json.dumps(GOOD)] + ["{"] * 9)))
    with pytest.raises(
        InputError, match=r"9 of 10 records are malformed: line 2: .*line 6: .*; and 4 more$"
    ) as caught:
        refuse_bad_rows(reading)
    assert "line 7" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("[]", "no records"),
        ("[1]", "no records: record 0"),
        ("a,b\n1,2\n", "neither a JSON array nor JSON lines"),
        ('{\n"data": []\n}', "one JSON object"),
        ('[{"a": 1} {"b": 2}]', "not a JSON array: Expecting ',' or ']': line 1 column 11"),
        ('[{"a": 1},\n{"b": }]', "not a JSON array: .*line 2 column 7"),
        ('[{"a": 1}', "not a JSON array"),
        ("[{}] x", "Extra data"),
        (b"[\xff]", "not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_data_is_refused_in_one_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json: no such file"):
        read(str(tmp_path / "nowhere.json"))


def test_line_separators_inside_text_end_no_line(tmp_path: Path) -> None:
    rows, bad = read_rows(
        write(tmp_path, json.dumps({"a": "x\u2028y\u0085z"}, ensure_ascii=False) + "\r\n" + '{"a": "b"}')
    )
    assert ([row.where for row in rows], bad) == (["line 1", "line 2"], [])


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    assert read(write(tmp_path, b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())).facts[0].new_answer == "new"
