"""The rows of an evaluation on disk: each rank appends to a file of its own, and in the end all become one.

A killed run leaves its ranks' files. Their rows are not computed again, even by another number of ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.artifact import write_text
from pipeline.evaluate.scores import Row

RECORDS = "records.jsonl"


def read_rows(folder: Path) -> list[Row]:
    """The rows of a finished evaluation, one a fact, in the facts' order."""
    return list(_rows(folder / RECORDS))


def recover(folder: Path) -> set[str]:
    """Ids of the facts that a killed run has finished in `folder`. Removes lines that were cut off."""
    for file in _rank_files(folder):
        _drop_torn_line(file)
    return set(_finished(folder))


def append(folder: Path, rank: int, rows: Iterable[Row]) -> None:
    """Add `rows` to this rank's file; they are on the disk when this returns."""
    with (folder / f"records-rank{rank}.jsonl").open("ab") as file:
        file.write(b"".join(_line(row).encode() for row in rows))
        file.flush()
        os.fsync(file.fileno())


def merge(folder: Path, ids: Sequence[str]) -> list[Row]:
    """Write all rows to `records.jsonl`, in the order of `ids`, and delete the ranks' files."""
    finished = _finished(folder)
    rows = [finished[fact_id] for fact_id in ids]
    # Delete after the merged file is on the disk: killed in between, the rows are there twice, not lost.
    write_text(folder / RECORDS, "".join(_line(row) for row in rows))
    for file in _rank_files(folder):
        file.unlink()
    return rows


def _rank_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("records-rank*.jsonl"))


def _finished(folder: Path) -> dict[str, Row]:
    # `records.jsonl` itself is there if the run was killed between merging and its manifest.
    files = [*_rank_files(folder), *folder.glob(RECORDS)]
    return {row["id"]: row for file in files for row in _rows(file)}


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rows(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _drop_torn_line(file: Path) -> None:
    # Cut off, not skipped: the next row is appended to the same file, and would end the torn line.
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
