"""The stages `teach`, `tune_old` and `learn`: one fine-tuning, full or LoRA, of the model that an earlier
stage made.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, write_json
from pipeline.context import Context
from pipeline.errors import InputError
from pipeline.models.load import load_tokenizer
from pipeline.train.checkpoint import Checkpoints, Saved
from pipeline.train.fit import fit
from pipeline.train.job import Job, plan_job
from pipeline.train.log import StepLog, read_steps, summarise
from pipeline.train.result import write_adapter, write_full

_LOG = "steps.jsonl"


def run(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Fine-tune `inputs["model"]` on `inputs["facts"]`. Every rank calls this.

    `section["target"]` says which answers. With `section["keeps_checkpoint"]` (the paper's FT-old) the last
    ZeRO checkpoint stays as the result, to be subtracted in place. All else leaves a model folder, or LoRA's
    adapter.

    Raises InputError for bad settings, records that are too long or too little disk; Preempted when asked to
    stop.
    """
    facts_path = out / "training.json"
    checkpoints = Checkpoints(out / "checkpoints", context)
    if not context.share(facts_path.is_file()):
        job = plan_job(section, inputs, context)
        saved = _train(job, out, checkpoints, context)
        if context.is_main:
            write_json(facts_path, _write_result(job, saved, out, context))
        context.barrier()
    facts: dict[str, Any] = json.loads(facts_path.read_text(encoding="utf-8"))
    if facts["model_kind"] != "zero":
        checkpoints.remove()
    return facts


def _train(job: Job, out: Path, checkpoints: Checkpoints, context: Context) -> Saved:
    """The checkpoint after the last step: found, if a killed run left it, else trained for."""
    saved = checkpoints.latest()
    if saved is None or saved.step < job.course.num_steps:
        _require_disk(job, saved, out, context)
        fit(job, saved, checkpoints, StepLog(out / _LOG), context)
        saved = checkpoints.latest()
    assert saved is not None and saved.step == job.course.num_steps
    return saved


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
        write_adapter(saved.folder, out / "adapter", job.adapter, job.folder, load_tokenizer(job.base))
        made = {"model": "adapter", "model_kind": "adapter"}
    else:
        write_full(saved.folder, out / "model", job.folder, context)
        made = {"model": "model", "model_kind": "folder"}
    return made | job.described() | summarise(read_steps(out / _LOG))
