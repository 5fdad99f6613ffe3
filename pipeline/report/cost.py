"""What a run cost: seconds and memory of its steps, by method, in words for people.

Over several seeds these are means: what one seed costs.
"""

from __future__ import annotations

from typing import Any

from pipeline.report.seeds import over_seeds
from pipeline.report.terms import STATES, look
from pipeline.stages import STAGES

Json = dict[str, Any]

UPDATES = {name: stage.label or name for name, stage in STAGES.items() if stage.is_update}
"""The stages of a method itself, by name, and what they are called. All methods share the making of the
original model, and evaluation is no part of any.
"""


def update_seconds(results: Json, method: str) -> dict[str, float]:
    """Seconds that `method` would take by itself in each of its stages.

    A step that methods share counts for each of them.
    """
    found: dict[str, float] = {}
    num_seeds = len(results["seeds"])
    for step in results["stages"]:
        if step["stage"] in UPDATES and method in step["methods"]:
            share = (len(step["seeds"]) or num_seeds) / num_seeds
            found[step["stage"]] = found.get(step["stage"], 0.0) + share * step["seconds"]
    return found


def shown_steps(stages: list[Json]) -> list[Json]:
    """Rows of `stages` with a `label`: one for all seeds, and one for all evaluations, at the end."""
    named = [step | {"users": tuple(step["methods"])} for step in stages]
    steps = over_seeds(named, ("stage", "users", "state"), ("seconds", "peak_memory_bytes"))
    evaluations = [step for step in steps if step["state"] is not None]
    shown = [step | {"label": step_label(step | {"seeds": []})} for step in steps if step["state"] is None]
    if evaluations:
        together = {
            "label": f"{evaluations[0]['stage']}, {len(evaluations)} models",
            "methods": [],
            "seconds": sum(step["seconds"] for step in evaluations),
            "peak_memory_bytes": max(step["peak_memory_bytes"] for step in evaluations),
        }
        shown.append(together)
    return shown


def step_label(step: Json) -> str:
    """`learn: F-Learning_FT`, `evaluate: forgotten, LoRA, seed 1`, `teach`; of a row of `stages`."""
    name = STAGES[step["stage"]].label or step["stage"]
    details = [STATES[step["state"]]] if step["state"] else []
    details += [look(method).label for method in step["methods"]]
    details += [f"seed {seed}" for seed in step["seeds"]]
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
