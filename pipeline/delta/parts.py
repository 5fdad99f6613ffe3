"""Which parts of a shared subtraction are done: a small file for each, beside what they write. Imports no
torch: planning asks.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.artifact import write_json

Part = tuple[int, int]
"""(index from 0, number of parts)."""


def note_done(folder: Path, part: Part) -> None:
    """Note that every shard of `part` is in place."""
    write_json(_note(folder, part), {})


def missing_parts(folder: Path, num_parts: int) -> list[Part]:
    """The parts yet to be done. All of them where all are noted: what made the result whole was then
    interrupted.
    """
    parts = [(index, num_parts) for index in range(num_parts)]
    return [part for part in parts if not _note(folder, part).is_file()] or parts


def _note(folder: Path, part: Part) -> Path:
    return folder / f"part-{part[0] + 1}-of-{part[1]}.json"
