"""Data sets through `datasets`: a local folder stands for the hub, which tests do not reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.facts.read import read

RECORDS: list[dict[str, Any]] = [
    {"src": "Q1?", "alt": "a", "pred": "old", "subject": "S", "cond": None},
    {"src": "Q2?", "alt": "b", "pred": "old", "subject": "T"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    return data


def write(folder: Path, *splits: str) -> str:
    for split in splits:
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS))
    return str(folder)


def test_a_folder_is_read_by_datasets(folder: Path) -> None:
    reading = read(write(folder, "train", "test"))
    assert (reading.format, reading.num_records, reading.bad_rows) == ("zsre", 2, [])
    assert [(fact.prompt, fact.old_answers, fact.new_answer) for fact in reading.facts] == [
        ("Q1?", ["old"], "a"),
        ("Q2?", ["old"], "b"),
    ]
    assert "cond" not in reading.fields


def test_a_choice_of_splits_is_the_users(folder: Path) -> None:
    with pytest.raises(InputError, match="has the splits"):
        read(write(folder, "validation", "test"))


def test_a_hub_id_may_name_its_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    write(folder, "validation", "test")
    real, asked = datasets.load_dataset, []

    def load_dataset(path: str, split: str | None = None) -> Any:
        asked.append((path, split))
        return real(str(folder), split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name:test").num_records == 2
    assert asked == [("owner/name", "test")]


def test_without_a_network_it_says_so_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"owner/no-such-set: datasets cannot load it.*give a local JSON file"
    ) as caught:
        read("owner/no-such-set")
    assert "\n" not in str(caught.value)
