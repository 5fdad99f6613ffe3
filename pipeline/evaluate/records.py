"""The records of an evaluation on disk: every rank appends to a part of its own, and in the end they become
one file.

A killed run leaves parts; whatever rows they hold are not computed again, even by another number of ranks.
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
    """Ids of the records that a killed run finished in `folder`. A last line that was cut off is removed from
    its part.
    """
    for part in _parts(folder):
        _drop_torn_line(part)
    return set(_finished(folder))


def append(folder: Path, rank: int, rows: Iterable[Row]) -> None:
    """Add `rows` to this rank's part; they are on the disk when this returns."""
    with (folder / f"records-rank{rank}.jsonl").open("ab") as part:
        part.write(b"".join(_line(row).encode() for row in rows))
        part.flush()
        os.fsync(part.fileno())


def merge(folder: Path, ids: Sequence[str]) -> list[Row]:
    """Write the rows of all parts, in the order of `ids`, to `records.jsonl`, and delete the parts."""
    finished = _finished(folder)
    rows = [finished[record_id] for record_id in ids]
    write_text(folder / RECORDS, "".join(_line(row) for row in rows))
    for part in _parts(folder):
        part.unlink()
    return rows


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("records-rank*.jsonl"))


def _finished(folder: Path) -> dict[str, Row]:
    # `records.jsonl` itself is there if the run was killed between merging and its manifest.
    files = [*_parts(folder), *folder.glob(RECORDS)]
    return {row["id"]: row for file in files for row in _rows(file)}


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rows(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _drop_torn_line(part: Path) -> None:
    content = part.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(part, whole)
