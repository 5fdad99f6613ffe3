"""STAGES: one row a stage: its function, its version, who runs it, and what job of a cluster it is.

Functions are named, not imported: the table imports nothing, and code is loaded where it is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

JobShape = Literal["ranks", "gpu", "cpu", "parts"]
"""What a scheduler gives a stage. ranks: all ranks, a GPU each; gpu: one process with one; cpu: one without;
parts: an array of processes without, which share the work.
"""


@dataclass(frozen=True)
class Stage:
    """One kind of work. Text such as `pipeline.train.stage:run` names a function: `module:name`."""

    function: str
    """`(section, inputs, output folder, context) -> result`; see `pipeline/run_step.py`."""
    version: int
    """Raise it when the same settings give another result, or old artifacts are taken for new ones."""
    ranks: Literal["all", "one"]
    """Who calls the function: every rank together, or rank 0 alone while the others wait."""
    job: JobShape
    check: str | None = None
    """`(section, inputs, context)`: raises InputError where the stage could not work. It does no work."""
    needs: str | None = None
    """`(section, model, data, ranks) -> Needs`: memory, disk and time; None: next to nothing."""
    label: str = ""
    """What the report calls it, if not by its own name."""
    is_update: bool = False
    """Whether a method updates the original model by it: the report adds up these stages' time."""


def _fine_tuning(version: int, label: str = "", is_update: bool = False) -> Stage:
    """A stage that trains: all of them share one function, and what that asks for."""
    return Stage(
        "pipeline.train.stage:run",
        version,
        ranks="all",
        job="ranks",
        check="pipeline.train.job:plan_job",
        needs="pipeline.train.training_needs:training_needs",
        label=label,
        is_update=is_update,
    )


STAGES: dict[str, Stage] = {
    "facts": Stage("pipeline.facts.stage:run", version=1, ranks="one", job="cpu"),
    "model": Stage("pipeline.models.stage:run", version=1, ranks="one", job="cpu"),
    "teach": _fine_tuning(version=1),
    "tune_old": _fine_tuning(version=1, label="FT-old", is_update=True),
    # Its version goes up with ARITHMETIC_VERSION: a subtraction that an earlier version began cannot go on.
    "forget": Stage(
        "pipeline.delta.stage:run",
        version=2,
        ranks="one",
        job="parts",
        needs="pipeline.delta.forget_needs:forget_needs",
        label="subtract",
        is_update=True,
    ),
    "learn": _fine_tuning(version=1, is_update=True),
    "evaluate": Stage(
        "pipeline.evaluate.stage:run",
        version=1,
        ranks="all",
        job="gpu",
        needs="pipeline.evaluate.evaluation_needs:evaluation_needs",
    ),
    "report": Stage("pipeline.report.stage:run", version=2, ranks="one", job="cpu"),
}


def load(name: str) -> Any:
    """The function that `name` (`module:name`) stands for."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)
