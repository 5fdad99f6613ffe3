"""Run one step in this process: find its inputs, call its stage, commit what it made."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from pipeline.artifact import Artifact, write_json
from pipeline.context import (
    Context,
    Preempted,
    log,
    peak_gpu_memory_bytes,
    peak_memory_bytes,
    reset_peak_memory,
)
from pipeline.errors import InputError
from pipeline.plan import Existing, Plan, Step
from pipeline.stages import STAGES, load

ATTEMPTS = "attempts.json"

StageFunction = Callable[[dict[str, Any], dict[str, Artifact], Any, Context], "dict[str, Any] | None"]
"""A stage returns its result; or None where other processes (`Context.part`) have yet to do their share."""


def run_step(plan: Plan, step: Step, context: Context) -> None:
    """Run `step` unless it is complete. Every rank of `context` calls this together.

    Raises what the stage raises: InputError for bad input, Preempted if asked to stop. The folder then stays
    without a manifest, and the next run goes on from what the stage saved there.
    """
    output = plan.artifact(step)
    if context.share(output.is_complete):
        return
    inputs = {role: plan.artifact(source) for role, source in step.inputs.items()}
    for source in inputs.values():
        source.manifest  # noqa: B018 - raises where an input is not complete, whatever a scheduler believed
    output.folder.mkdir(parents=True, exist_ok=True)
    reset_peak_memory(context.device)
    _check_ahead(plan, step, context)
    with _attempt(output, context) as attempt:
        result = _call(step, inputs, output, context)
    peaks = {
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(context.device),
    }
    peaks = {name: None if value is None else context.largest(value) for name, value in peaks.items()}
    if context.is_main and result is None:
        assert context.part is not None
        index, total = context.part
        log.info("%s: part %d/%d is done; others are not yet", step.id, index + 1, total)
    elif context.is_main:
        assert result is not None
        output.commit(_manifest(step, result, context) | asdict(attempt) | peaks)
        (output.folder / ATTEMPTS).unlink(missing_ok=True)
        log.info("%s: done in %.1f s", step.id, attempt.seconds)
    context.barrier()


@dataclass
class Attempt:
    """Time spent on a step so far, but for attempts that were killed."""

    num_attempts: int
    seconds: float


@contextmanager
def _attempt(output: Artifact, context: Context) -> Iterator[Attempt]:
    """Count this attempt and its time with those before it: a preempted fine-tuning takes several."""
    path = output.folder / ATTEMPTS
    before: dict[str, Any] = {"num_attempts": 0, "seconds": 0.0}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
    attempt = Attempt(before["num_attempts"] + 1, before["seconds"])
    started = time.time()
    if context.is_main:
        write_json(path, asdict(attempt))
    try:
        yield attempt
    finally:
        attempt.seconds = round(before["seconds"] + time.time() - started, 3)
        if context.is_main:
            with suppress(OSError):  # a full disk must not hide the error that it caused
                write_json(path, asdict(attempt))


def _check_ahead(plan: Plan, step: Step, context: Context) -> None:
    """Before the first of the steps that can be checked: check all others. Raises InputError.

    Hours later, when their turn comes, would be a bad time to learn of settings or records that cannot work.
    """
    checked = [other for other in plan.steps.values() if STAGES[other.stage].check is not None]
    if step not in checked or any(plan.artifact(other).is_complete for other in checked):
        return
    for other in checked:
        check = STAGES[other.stage].check
        base = plan.artifact(_base_of(other))
        # A step checks itself when it starts; a base model that is not made yet is another seed's.
        if check is None or other is step or not base.is_complete:
            continue
        inputs = {role: plan.artifact(source) for role, source in other.inputs.items()} | {"model": base}
        try:
            load(check)(other.section, inputs, context)
        except InputError as error:
            raise InputError(f"{other.stage} ({other.users}): {error}") from None


def _base_of(step: Step) -> Step | Existing:
    """The base model that `step` descends from, whose config and tokenizer all models made of it share."""
    base: Step | Existing = step
    while source := base.inputs.get("base") or base.inputs.get("model"):
        base = source
    return base


def _call(
    step: Step, inputs: dict[str, Artifact], output: Artifact, context: Context
) -> dict[str, Any] | None:
    stage = STAGES[step.stage]
    function: StageFunction = load(stage.function)
    if stage.ranks == "all":
        return function(step.section, inputs, output.folder, context)
    result: dict[str, Any] | None = None
    stopped: str | None = None
    if context.is_main:
        try:
            result = function(step.section, inputs, output.folder, context)
        except Preempted as request:
            stopped = str(request)
    stopped = context.share(stopped)  # the ranks that wait stop with it
    if stopped is not None:
        raise Preempted(stopped)
    return result


def _manifest(step: Step, result: dict[str, Any], context: Context) -> dict[str, Any]:
    return {
        "stage": step.stage,
        "version": STAGES[step.stage].version,
        "fingerprint": step.fingerprint,
        "section": step.section,
        "inputs": {role: source.id for role, source in step.inputs.items()},
        "result": result,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "num_ranks": context.world_size,
        "device": context.device,
        "host": os.uname().nodename,
    }
