"""The facts stage: what is kept, what is dropped, and what it says about that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Facts
from pipeline.context import Context
from pipeline.errors import InputError
from pipeline.facts.fact import Fact, read_facts
from pipeline.facts.stage import run


def row(number: int, **changes: Any) -> dict[str, Any]:
    fact = {
        "id": f"f{number}",
        "subject": f"S{number}",
        "prompt": f"Q{number}?",
        "old_answers": [f"old {number}"],
        "new_answer": f"new {number}",
        "rephrasings": [f"R{number}?"],
        "locality": [{"prompt": f"L{number}?", "answers": ["l"], "kind": "far"}],
    }
    return fact | changes


def run_stage(
    folder: Path, rows: list[dict[str, Any]], needs_old_answer: bool = True, **settings: Any
) -> tuple[dict[str, Any], list[Fact]]:
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in rows))
    out = folder / "out"
    out.mkdir(exist_ok=True)
    section = {
        "facts": Facts(path=str(data), **settings).model_dump(mode="json"),
        "needs_old_answer": needs_old_answer,
    }
    reported = run(section, {}, out, Context())
    assert json.loads(json.dumps(reported)) == reported
    return reported, list(read_facts(out / "facts.jsonl"))


def test_a_clean_file_is_kept_whole_and_without_warnings(tmp_path: Path) -> None:
    reported, facts = run_stage(tmp_path, [row(1), row(2, year=1997)])
    assert [fact.id for fact in facts] == ["f1", "f2"]
    assert facts[1].year == 1997
    assert (reported["format"], reported["num_read"], reported["num_facts"]) == ("flearn", 2, 2)
    assert (reported["dropped"], reported["conflicts"], reported["warnings"]) == ({}, {}, [])


def test_every_loss_is_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        row(1),
        row(2, new_answer="  "),
        row(3, prompt=""),
        row(4, old_answers=[]),
        row(5, old_answers=["x", "NEW   5"]),
        row(6, prompt="same?"),
        row(7, prompt="same?"),
        row(8),
        row(9),
    ]
    reported, facts = run_stage(tmp_path, rows, limit=2)
    assert [fact.id for fact in facts] == ["f1", "f8"]
    assert reported["dropped"] == {
        "empty_new_answer": 1,
        "empty_prompt": 1,
        "no_old_answer": 1,
        "old_equals_new": 1,
        "contradiction": 2,
    }
    assert (
        reported["num_read"]
        == sum(reported["dropped"].values()) + reported["num_over_limit"] + reported["num_facts"]
        == 9
    )
    assert any(
        "2 of 9 facts (22.2%) contradict another fact; 2 of them were dropped" in warning
        for warning in reported["warnings"]
    )
    assert any("1 of 9 facts were dropped: no old answer" in warning for warning in reported["warnings"])


def test_the_limit_counts_facts_that_survive(tmp_path: Path) -> None:
    rows = [row(1, new_answer=""), row(2, prompt="same?"), row(3, prompt="same?"), row(4), row(5), row(6)]
    assert [fact.id for fact in run_stage(tmp_path, rows, limit=2)[1]] == ["f4", "f5"]
    assert [fact.id for fact in run_stage(tmp_path, rows, limit=2, conflicts="keep_first")[1]] == ["f2", "f4"]


def test_an_unusable_fact_contradicts_none(tmp_path: Path) -> None:
    rows = [row(1, prompt="same?", old_answers=[]), row(2, prompt="same?")]
    assert [fact.id for fact in run_stage(tmp_path, rows)[1]] == ["f2"]


def test_old_answers_are_needed_only_for_forgetting(tmp_path: Path) -> None:
    reported, facts = run_stage(tmp_path, [row(1, old_answers=[])], needs_old_answer=False)
    assert len(facts) == 1
    assert any("1 of 1 facts lack an old answer" in warning for warning in reported["warnings"])


def test_questions_that_cannot_be_scored_are_dropped_and_counted(tmp_path: Path) -> None:
    probes = [
        {"prompt": p, "answers": a, "kind": ""}
        for p, a in [("Q2?", ["x"]), ("R2?", ["x"]), ("L?", []), ("L?", ["y"])]
    ]
    reported, facts = run_stage(
        tmp_path, [row(1, locality=probes, portability=[{"prompt": "Q2?", "answers": ["new 2"]}]), row(2)]
    )
    assert [probe.prompt for probe in facts[0].locality] == ["L?"]
    assert [probe.prompt for probe in facts[0].portability] == ["Q2?"]
    assert reported["dropped_probes"] == {"edited_question": 2, "no_answer": 1}
    assert any("2 locality questions were dropped" in warning for warning in reported["warnings"])


def test_gaps_and_clashes_are_told(tmp_path: Path) -> None:
    clash = row(1, locality=[{"prompt": "neighbour", "answers": ["old 1"], "kind": ""}])
    reported, _ = run_stage(tmp_path, [clash, row(2, rephrasings=[], locality=[])])
    text = "\n".join(reported["warnings"])
    assert "1 of 2 facts lack a rephrasing" in text
    assert "1 of 2 facts lack a locality question" in text
    assert "in 1 of 2 facts a locality question's answer is the old answer itself" in text


def test_no_fact_left_is_an_error_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no fact is left of 3 \(empty_new_answer 1, no_old_answer 2\)"):
        run_stage(tmp_path, [row(1, new_answer=""), row(2, old_answers=[]), row(3, old_answers=[])])


def test_a_malformed_record_stops_the_stage_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.jsonl: 1 of 2 records are malformed: line 2: new_answer"):
        run_stage(tmp_path, [row(1), row(2, new_answer=None) | {"new_answer": 3}])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_contradiction_can_be_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"facts\.conflicts=error: 2 of 2 facts"):
        run_stage(tmp_path, [row(1, prompt="same?"), row(2, prompt="same?")], conflicts="error")
