"""Run one job on a DeepSpeed engine: model, engine, theta' in fp32, the loop, and a checkpoint at its end."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from pipeline.context import Context, log
from pipeline.models.load import open_weights
from pipeline.models.targets import TargetLogits
from pipeline.train.checkpoint import Checkpoints, Saved
from pipeline.train.engine import drop_moments, engine_for, session
from pipeline.train.job import Job
from pipeline.train.log import StepLog
from pipeline.train.loop import train
from pipeline.train.lora import InitialAdapter, add_adapter
from pipeline.train.masters import Binding, load
from pipeline.train.model import bind, build


def fit(job: Job, saved: Saved | None, checkpoints: Checkpoints, step_log: StepLog, context: Context) -> None:
    """Train from the start, or go on from `saved`, until the last checkpoint is written. Collective.

    Raises Preempted, after saving, when asked to stop.
    """
    with session(job.ready):
        _fit(job, saved, checkpoints, step_log, context)


def _fit(
    job: Job, saved: Saved | None, checkpoints: Checkpoints, step_log: StepLog, context: Context
) -> None:
    with closing(open_weights(job.base)) as source:
        model, bindings = _prepare(job, source, context)
        with TargetLogits(model) as picked, engine_for(model, job.ready, job.training) as engine:
            log.info(
                "%s: %d of %d parameters, ZeRO-%d",
                type(model).__name__,
                job.num_trained,
                job.num_parameters,
                job.ready.zero_stage,
            )
            _set_weights(engine, bindings, saved, checkpoints, job)
            start = saved.step if saved is not None else 0

            def save(step: int) -> None:
                if step == job.course.num_steps:
                    drop_moments(engine)
                checkpoints.save(engine, step, without_frozen=job.adapter is not None)

            with step_log:
                if context.is_main:
                    step_log.open(start)
                train(engine, picked, job.course, start, save, step_log, context)


def _prepare(job: Job, source: Any, context: Context) -> tuple[Any, list[Binding]]:
    """The model, its weights still empty, and what they are to hold."""
    model: Any = build(
        job.folder, context.device, job.training.precision, job.training.gradient_checkpointing
    )
    bindings = bind(model, source)
    if job.adapter is None:
        return model, bindings
    model = add_adapter(model, job.adapter)
    initial = InitialAdapter(model, job.course.seed)
    own = [
        Binding(parameter, initial, name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return model, bindings + own


def _set_weights(
    engine: Any, bindings: list[Binding], saved: Saved | None, checkpoints: Checkpoints, job: Job
) -> None:
    """Fill the engine: frozen weights always from their source, trained ones from there or from the
    checkpoint.
    """
    if saved is None:
        load(engine, bindings)
        return
    load(engine, [binding for binding in bindings if not binding.parameter.requires_grad])
    checkpoints.load(engine, saved, without_frozen=job.adapter is not None)
