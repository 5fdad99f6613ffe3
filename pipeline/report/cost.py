"""What a run cost: seconds and memory of its steps, by method, in words for people."""

from __future__ import annotations

from typing import Any

from pipeline.report.names import STATES, look

Json = dict[str, Any]

TRAINING = ("tune_old", "forget", "learn")
"""The stages of a method itself: neither the original model's making, which all share, nor evaluation."""
STAGE_LABELS = {"tune_old": "FT-old", "forget": "subtract", "learn": "learn"}


def training_seconds(stages: list[Json], method: str) -> float:
    """Seconds that `method` would take by itself; a step that methods share counts for each of them."""
    return sum(step["seconds"] for step in stages if step["stage"] in TRAINING and method in step["methods"])


def step_label(step: Json) -> str:
    """`learn: F-Learning_FT`, `evaluate: forgotten, LoRA`, `teach`; of a row of `stages`."""
    stage: str = step["stage"]
    name = STAGE_LABELS.get(stage, stage)
    details = [STATES[step["state"]]] if step.get("state") else []
    details += [look(method).label for method in step["methods"]]
    return f"{name}: {', '.join(details)}" if details else name


def duration(seconds: float) -> str:
    """`0.4 s`, `52 s`, `3 min 07 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: int) -> str:
    """`812 MiB`, `23.4 GiB`."""
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"
