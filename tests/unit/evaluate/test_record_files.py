"""Rows on disk: what a killed run left is used, a torn line is not, and the ranks' files become one."""

from __future__ import annotations

from pathlib import Path

from pipeline.evaluate import record_files


def rows(*identifiers: str) -> list[dict[str, str]]:
    return [{"id": identifier, "text": "Å\n\u2028"} for identifier in identifiers]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_ranks_files_are_merged_in_the_facts_order_and_deleted(tmp_path: Path) -> None:
    record_files.append(tmp_path, 0, rows("c", "a"))
    record_files.append(tmp_path, 3, rows("b"))
    record_files.append(tmp_path, 0, rows("d"))
    assert record_files.merge(tmp_path, ["a", "b", "c", "d"]) == rows("a", "b", "c", "d")
    assert record_files.read_rows(tmp_path) == rows("a", "b", "c", "d")
    assert names(tmp_path) == ["records.jsonl"]


def test_a_torn_line_is_dropped_and_can_be_appended_after(tmp_path: Path) -> None:
    record_files.append(tmp_path, 0, rows("a"))
    record_files.append(tmp_path, 1, rows("b", "c"))
    file = tmp_path / "records-rank1.jsonl"
    file.write_bytes(file.read_bytes()[:-7])
    assert record_files.recover(tmp_path) == {"a", "b"}
    record_files.append(tmp_path, 1, rows("c"))
    assert record_files.recover(tmp_path) == {"a", "b", "c"}


def test_a_file_that_is_one_torn_line(tmp_path: Path) -> None:
    (tmp_path / "records-rank0.jsonl").write_text('{"id": "a", "te')
    assert record_files.recover(tmp_path) == set()
    record_files.append(tmp_path, 0, rows("a"))
    assert record_files.merge(tmp_path, ["a"]) == rows("a")


def test_killed_after_merging(tmp_path: Path) -> None:
    record_files.append(tmp_path, 0, rows("a"))
    record_files.append(tmp_path, 1, rows("b"))
    left = (tmp_path / "records-rank1.jsonl").read_bytes()
    record_files.merge(tmp_path, ["a", "b"])
    (tmp_path / "records-rank1.jsonl").write_bytes(left)
    assert record_files.recover(tmp_path) == {"a", "b"}
    assert record_files.merge(tmp_path, ["a", "b"]) == rows("a", "b")
    assert names(tmp_path) == ["records.jsonl"]
