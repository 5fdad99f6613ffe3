"""Users' mistakes through the command: each is one line that says what to do, exit code 2, and nothing
half-written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FACT = {
    "id": "a",
    "subject": "Kazakhstan",
    "prompt": "What is the capital of Kazakhstan?",
    "old_answers": ["Almaty"],
    "new_answer": "Astana",
    "rephrasings": [],
    "locality": [],
}
ZSRE = {
    "subject": "a",
    "src": "Who is a?",
    "pred": "b",
    "rephrase": "Who a?",
    "alt": "c",
    "answers": ["b"],
    "loc": "d",
    "loc_ans": "e",
}

pytestmark = pytest.mark.slow


def refused(tmp_path: Path, *overrides: str) -> str:
    """The one line that `flearn run` says."""
    settings = ["cluster.ranks=1", f"cluster.runs_dir={tmp_path / 'runs'}", *overrides]
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "launch", "run", "configs/quickstart.yaml", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert not list((tmp_path / "runs").glob("*/results.json"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("flearn: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "overrides", "words"),
    [
        ([FACT, {**FACT, "id": "b", "new_answer": 7}], [], ["facts.jsonl", "2", "new_answer"]),
        ([ZSRE], ["facts.format=counterfact"], ["facts.jsonl", "zsre"]),
        ([{**FACT, "new_answer": " "}], [], ["no fact", "empty"]),
        ([{**FACT, "new_answer": "Almaty"}], [], ["no fact"]),
    ],
    ids=["malformed row", "another schema", "empty answer", "nothing left"],
)
def test_bad_facts(
    tmp_path: Path, rows: list[dict[str, Any]], overrides: list[str], words: list[str]
) -> None:
    line = refused(tmp_path, f"facts.path={write(tmp_path / 'facts.jsonl', *rows)}", *overrides)
    for word in words:
        assert word.lower() in line.lower()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.target_modules=[q_proj, query]", ["tune_old (flearn_lora", "lora.target_modules", "query"]),
        ("full.max_length=9", ["tune_old (flearn_ft)", "tokens", "max_length 9"]),
    ],
)
def test_what_a_later_fine_tuning_cannot_use_is_said_before_the_first(
    tmp_path: Path, override: str, words: list[str]
) -> None:
    line = refused(tmp_path, override, 'methods=["flearn_ft", "flearn_lora", "flearn_lora_ft"]')
    assert all(word in line for word in words), line
    assert not list(tmp_path.glob("runs/*/teach-*/steps.jsonl"))


def test_missing_model_folder(tmp_path: Path) -> None:
    line = refused(tmp_path, "model.tiny=null", f"model.path={tmp_path / 'nowhere'}")
    assert "model.path" in line
    assert str(tmp_path / "nowhere") in line


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(tmp_path, "model.tiny=null", f"model.path={tmp_path / 'empty'}")


def test_a_tokenizer_without_eos(tmp_path: Path, tiny_model: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = folder / "special_tokens_map.json"
    special.unlink(missing_ok=True)
    assert "EOS" in refused(tmp_path, "model.tiny=null", f"model.path={folder}")


def test_a_record_that_is_too_long(tmp_path: Path) -> None:
    line = refused(tmp_path, "facts.limit=4", "teach.max_length=3")
    assert "max_length" in line


def test_a_deepspeed_setting_that_corrupts(tmp_path: Path) -> None:
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    assert "round_robin_gradients" in refused(tmp_path, "facts.limit=4", f"teach.deepspeed={config}")


def test_a_run_goes_on_if_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    """As `flearn run CONFIG | true`: it used to end at its first line, with exit code 0."""
    reader, writer = os.pipe()
    os.close(reader)
    settings = [
        "--set",
        f"cluster.runs_dir={tmp_path / 'runs'}",
        "--set",
        f"facts.path={write(tmp_path / 'facts.jsonl', {**FACT, 'prompt': 7})}",
    ]
    command = [sys.executable, "-m", "launch", "run", "configs/quickstart.yaml", *settings]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 2, done.stderr
    assert "facts.jsonl" in done.stderr
