"""The inspection of a data file: what it counts, and how it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.facts.inspection import inspect, render

ROOT = Path(__file__).parents[3]


def row(number: int, **changes: Any) -> dict[str, Any]:
    fact = {
        "id": f"f{number}",
        "subject": f"S{number}",
        "prompt": f"Q{number}?",
        "old_answers": [f"old {number}"],
        "new_answer": f"new {number}",
        "rephrasings": [f"R{number}?"],
        "locality": [{"prompt": f"L{number}?", "answers": ["l"]}],
    }
    return fact | changes


def inspected(folder: Path) -> dict[str, Any]:
    path = folder / "data.jsonl"
    rows = [row(1), row(2, prompt="Q1?"), row(3, new_answer=""), row(4, rephrasings=[]), row(5, new_answer=4)]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return inspect(str(path))


def test_inspection_counts_what_is_there(tmp_path: Path) -> None:
    report = inspected(tmp_path)
    assert json.loads(json.dumps(report)) == report
    assert (report["format"], report["num_records"], report["num_facts"]) == ("flearn", 5, 3)
    assert report["fields"]["new_answer"] == 5
    assert report["having"] == {
        "subject": 3,
        "old answer": 3,
        "rephrasings": 2,
        "locality": 3,
        "portability": 0,
    }
    assert report["dropped"] == {"empty_new_answer": 1}
    assert report["conflicts"] == {"same_prompt": {"num_groups": 1, "num_facts": 2}}
    assert report["bad_rows"] == [{"where": "line 5", "reason": "new_answer: expected text, found a number"}]
    assert [example["id"] for example in report["examples"]] == ["f1", "f2"]


def test_the_rendering_shows_it(tmp_path: Path) -> None:
    text = render(inspected(tmp_path))
    assert "flearn, 5 records, 3 usable facts" in text
    assert "rephrasings (2 of 3)" in text
    assert "same_prompt: 2 facts in 1 groups" in text
    assert "line 5: new_answer" in text
    assert "old 1 -> new 1" in text


@pytest.mark.processes
def test_inspection_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "numpy")
    code = f"""
import sys, pipeline.facts.inspection, pipeline.facts.stage
print([name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
