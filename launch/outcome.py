"""How a worker tells those who started it how it ended: its exit code, and a file in the failed step's
folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.artifact import write_json

FAILED = 1
MISTAKE = 2
STOPPED = 75
"""Asked to stop, saved, and willing to go on (sysexits.h: EX_TEMPFAIL)."""

ERRORS = "error*.json"
"""Why a step, or a part of it, failed: {"rank", "message", "log", "attempt"}; gone once it succeeds, or is
submitted again.
"""


def error_file(folder: Path, part: tuple[int, int] | None) -> Path:
    """Where it is said of a step's folder, or of one (index, number) of the parts that share it."""
    return folder / ("error.json" if part is None else f"error-part-{part[0] + 1}.json")


def note_error(path: Path, rank: int, message: str) -> None:
    """Say it. SLURM counts how often it has started a job again; what it says of a later attempt is newer."""
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
    write_json(path, {"rank": rank, "message": message, "log": f"rank{rank}.log", "attempt": attempt})
