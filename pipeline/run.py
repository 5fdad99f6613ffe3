"""Run one step in this process: find its inputs, call its stage, commit what it made."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from pipeline.artifact import Artifact
from pipeline.context import Context, log, peak_memory_bytes, reset_peak_memory
from pipeline.stages import STAGES, Plan, Step

StageFunction = Callable[[dict[str, Any], dict[str, Artifact], Any, Context], "dict[str, Any] | None"]
"""A stage returns its facts; or None, if it shares its work with other processes (`Context.part`) that are not done yet."""


def run_step(plan: Plan, step: Step, context: Context) -> None:
    """Run `step` unless it is complete. Every rank of `context` calls this together.

    Raises what the stage raises: InputError for bad input, Preempted if asked to stop. The folder then stays without a
    manifest, and the next run goes on from what the stage saved there.
    """
    output = plan.artifact(step)
    if context.share(output.is_complete):
        return
    inputs = {role: plan.artifact(source) for role, source in step.inputs.items()}
    for source in inputs.values():
        source.manifest  # noqa: B018 - raises where an input is not complete, whatever the scheduler believed
    output.folder.mkdir(parents=True, exist_ok=True)
    reset_peak_memory()
    started = time.time()
    facts = _call(step, inputs, output, context)
    if context.is_main and facts is None:
        log.info("%s: part %s is done; others are not yet", step.id, context.part)
    elif context.is_main:
        assert facts is not None
        seconds = time.time() - started
        output.commit(_manifest(step, facts, seconds, context))
        log.info("%s: done in %.1f s", step.id, seconds)
    context.barrier()


def _call(step: Step, inputs: dict[str, Artifact], output: Artifact, context: Context) -> dict[str, Any] | None:
    stage = STAGES[step.stage]
    if stage.ranks == "one" and not context.is_main:
        return None
    module, _, name = stage.function.partition(":")
    function: StageFunction = getattr(importlib.import_module(module), name)
    return function(step.section, inputs, output.folder, context)


def _manifest(step: Step, facts: dict[str, Any], seconds: float, context: Context) -> dict[str, Any]:
    return {
        "stage": step.stage,
        "version": STAGES[step.stage].version,
        "section": step.section,
        "inputs": {role: source.id for role, source in step.inputs.items()},
        "methods": step.methods,
        "facts": facts,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "num_ranks": context.world_size,
        "device": context.device,
        "host": os.uname().nodename,
    }
