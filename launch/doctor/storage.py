"""Bytes on the disk: what a run leaves there, what comes and goes while it runs, and how much is written in
all.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from launch.doctor import estimate
from launch.doctor.capacity import Capacity, state_of
from launch.doctor.estimate import Data, Shape, training_of
from launch.doctor.machine import Row
from pipeline.config import Training
from pipeline.plan import Step
from pipeline.weights.source import DTYPE_BYTES

TUNINGS = ("teach", "tune_old", "learn")


class Stored(NamedTuple):
    """Bytes of one step."""

    result: int
    """What stays."""
    passing: int
    """What comes and goes beside the result, or before it: checkpoints."""
    written: int
    """All that is written from the step's start to its end."""


def disk_row(pending: list[Step], shape: Shape, data: Data, capacity: Capacity) -> Row:
    """The results that stay, the most that comes and goes at a time while stages run, and what has to be
    written.
    """
    steps, free = [stored(step, shape, data) for step in pending], capacity.disk_bytes
    stay, written = sum(one.result for one in steps), sum(one.written for one in steps)
    passing, order = max(one.passing for one in steps), "one by one"
    if capacity.on_cluster:
        passing, order = _side_by_side(pending, [one.passing for one in steps]), "side by side"
    detail = f"{size(stay + passing)} of {size(free)} free: results {size(stay)}, checkpoints of trainings {order} {size(passing)}"
    detail += f"; writes {size(written)} in all, checkpoints (checkpoint_every_steps) included"
    state = state_of(stay + passing, free)
    return Row(
        "disk for this run",
        state,
        detail,
        "" if state == "ok" else "set cluster.runs_dir to a larger disk, or run fewer methods",
    )


def _side_by_side(pending: list[Step], passing: list[int]) -> int:
    """The largest sum of `passing` over trainings none of which needs another: of each either itself, or the
    most of those after it.
    """
    after = {step.id: 0 for step in pending if step.stage in TUNINGS}
    most = 0
    for step, own in reversed(list(zip(pending, passing, strict=True))):
        if step.id in after:
            largest, needed = max(own, after[step.id]), _needed_training(step)
            if needed in after:
                after[needed] += largest
            else:
                most += largest
    return most


def _needed_training(step: Step) -> str:
    """The training that `step` waits for; the base model's step if none."""
    model = step.inputs["model"]
    return (model.inputs["tuned"] if model.stage == "forget" else model).id


def stored(step: Step, shape: Shape, data: Data) -> Stored:
    """What `step` does to the disk; steps that leave no weights count for nothing."""
    if step.stage == "forget":
        result = DTYPE_BYTES.get(step.section["forget"]["dtype"], 4) * shape.num_parameters
        return Stored(result, 0, result)
    if step.stage not in TUNINGS:
        return Stored(0, 0, 0)
    training = training_of(step)
    checkpoint = estimate.checkpoint_bytes(shape, training)
    last = estimate.checkpoint_bytes(shape, training, with_moments=False)
    keeps_checkpoint = step.section["keeps_checkpoint"]
    result = last if keeps_checkpoint else 4 * estimate.num_trained(shape, training)
    earlier = (_num_steps(step, training, data) - 1) // training.checkpoint_every_steps
    num_copies = 2 if earlier else 1  # an old one goes when the new one is whole
    written = earlier * checkpoint + last + (0 if keeps_checkpoint else result)
    return Stored(
        result, num_copies * checkpoint - result, written
    )  # the result is written where moments were


def _num_steps(step: Step, training: Training, data: Data) -> int:
    return training.epochs * ceil(estimate.num_records(step, data) / training.batch_size)


def size(num_bytes: float) -> str:
    """Bytes in decimal units."""
    if num_bytes >= 1e12:
        return f"{num_bytes / 1e12:.1f} TB"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"
