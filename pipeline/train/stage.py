"""The stages `teach`, `tune_old` and `learn`: one fine-tuning, full or LoRA, of an earlier stage's model."""

from __future__ import annotations

import json
import shutil
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, write_json
from pipeline.context import Context
from pipeline.errors import InputError
from pipeline.models.load import load_tokenizer, open_weights
from pipeline.train.checkpoint import Checkpoints, Saved
from pipeline.train.job import Job, plan_job
from pipeline.train.result import ADAPTER, MODEL, discard, write_adapter, write_full
from pipeline.train.session import Handover
from pipeline.train.step_log import StepLog, read_steps, summarise

_LOG = "steps.jsonl"


def run(
    section: dict[str, Any],
    inputs: dict[str, Artifact],
    out: Path,
    context: Context,
    handover: Handover | None = None,
) -> dict[str, Any]:
    """Fine-tune `inputs["model"]` on `inputs["facts"]`. Every rank calls this.

    `section["target"]` says which answers. With `section["keeps_checkpoint"]` (the paper's FT-old) the last
    ZeRO checkpoint stays as the result, to be subtracted in place. All else leaves a model folder, or LoRA's
    adapter. With a `handover`, the session of the step before is used if it fits, and left for the next step.

    Raises InputError for bad settings, records that are too long or too little disk; Preempted when asked to
    stop.
    """
    described = out / "training.json"
    checkpoints = Checkpoints(out / "checkpoints", context)
    if not context.share(described.is_file()):
        job = plan_job(section, inputs, context)
        with Handover() if handover is None else nullcontext(handover) as sessions:
            saved = _train(job, out, checkpoints, sessions, context)
        if context.is_main:
            write_json(described, _write_result(job, saved, out, context))
        context.barrier()
    result: dict[str, Any] = json.loads(described.read_text(encoding="utf-8"))
    if result["model_kind"] != "zero":
        checkpoints.remove()
    return result


def _train(job: Job, out: Path, checkpoints: Checkpoints, sessions: Handover, context: Context) -> Saved:
    """The checkpoint after the last step: found, if a killed run left it, else trained for."""
    saved = checkpoints.latest()
    if saved is not None and saved.step == job.course.num_steps:
        return saved
    _require_disk(job, saved, out, context)
    if context.is_main:
        discard(out)
    with closing(open_weights(job.base)) as source, sessions.session(job, context) as session:
        if saved is None:
            session.fill(source, job.course.seed)
        else:
            session.resume(source, checkpoints, saved)
        session.run(job.course, checkpoints, StepLog(out / _LOG), start=0 if saved is None else saved.step)
    last = checkpoints.latest()
    assert last is not None and last.step == job.course.num_steps
    return last


def _require_disk(job: Job, saved: Saved | None, out: Path, context: Context) -> None:
    needed = job.disk_bytes(0 if saved is None else 1)
    free = context.share(shutil.disk_usage(out).free)
    if free < needed:
        raise InputError(
            f"{out}: checkpoints and result need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free;"
            " free some space, or set cluster.runs_dir to a larger disk"
        )


def _write_result(job: Job, saved: Saved, out: Path, context: Context) -> dict[str, Any]:
    """Write the model or adapter, and describe all that was done."""
    if job.keeps_checkpoint:
        made = {"model": str(saved.folder.relative_to(out)), "model_kind": "zero"}
    elif job.adapter is not None:
        write_adapter(saved.folder, out / ADAPTER, job.adapter, job.folder, load_tokenizer(job.base))
        made = {"model": ADAPTER, "model_kind": "adapter"}
    else:
        write_full(saved.folder, out / MODEL, job.folder, context)
        made = {"model": MODEL, "model_kind": "folder"}
    return made | job.described() | summarise(read_steps(out / _LOG))
