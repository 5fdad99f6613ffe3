"""The published data sets themselves, where they are at hand: known counts, known traps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Facts
from pipeline.facts.inspection import inspect
from pipeline.facts.read import read
from pipeline.facts.select import select

DATA = Path(__file__).parents[3] / "../shared/data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the published data sets are not at hand")

FILES = {
    "zsre_mend_3000": ("zsre", 3000),
    "counterfact_edit_10000": ("counterfact", 10000),
    "knowedit_zsre_1304": ("knowedit", 1304),
    "knowedit_wiki_counterfact_1428": ("knowedit", 1428),
    "knowedit_wiki_recent_570": ("knowedit", 570),
    "qaedit_1000": ("qaedit", 1000),
}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    return {name: inspect(str(DATA / f"{name}.json")) for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_every_record_is_read(reports: dict[str, dict[str, Any]], name: str) -> None:
    report = reports[name]
    assert (report["format"], report["num_records"], report["bad_rows"]) == (*FILES[name], [])
    assert report["num_facts"] + sum(report["dropped"].values()) == report["num_records"]


def test_zsre_contradicts_itself(reports: dict[str, dict[str, Any]]) -> None:
    conflicts = reports["zsre_mend_3000"]["conflicts"]
    assert conflicts["same_subject_and_old_answer"]["num_facts"] == 497
    assert conflicts["rephrasing_is_a_prompt"]["num_groups"] == 28


def test_counterfact_has_62_prompts_with_two_targets(reports: dict[str, dict[str, Any]]) -> None:
    assert reports["counterfact_edit_10000"]["conflicts"]["same_prompt"] == {
        "num_groups": 62,
        "num_facts": 143,
    }


def test_zsre_old_answers(reports: dict[str, dict[str, Any]]) -> None:
    path = str(DATA / "zsre_mend_3000.json")
    pred, true = (read(path, old_answer=choice).facts for choice in ("pred", "answers"))
    assert sum(p.old_answer in t.old_answers for p, t in zip(pred, true, strict=True)) == 652
    assert not any(fact.new_answer != fact.new_answer.strip() for fact in pred)
    assert not any("nq question" in probe.prompt for fact in pred for probe in fact.locality)


def test_what_knowedit_lacks(reports: dict[str, dict[str, Any]]) -> None:
    assert reports["knowedit_wiki_recent_570"]["having"]["old answer"] == 0
    assert reports["knowedit_wiki_recent_570"]["dropped_probes"] == {"no_answer": 7}
    assert reports["knowedit_zsre_1304"]["dropped"] == {"old_equals_new": 43}
    assert (
        reports["knowedit_zsre_1304"]["having"]["portability"] == reports["knowedit_zsre_1304"]["num_facts"]
    )


@pytest.mark.parametrize("policy", ["drop", "keep_first"])
def test_selected_zsre_facts_agree(policy: Any) -> None:
    facts = read(str(DATA / "zsre_mend_3000.json")).facts
    selection = select(facts, Facts(path="zsre", conflicts=policy), needs_old_answer=True)
    assert len(selection.facts) + selection.dropped["contradiction"] == 3000
    targets: dict[tuple[str, str | None], set[str]] = {}
    for fact in selection.facts:
        targets.setdefault((fact.subject, fact.old_answer), set()).add(fact.new_answer)
    assert all(len(found) == 1 for found in targets.values())
