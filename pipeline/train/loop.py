"""The training loop: optimizer steps over the planned batches, logged, checkpointed, and stopped when
asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Training
from pipeline.context import Context, Preempted
from pipeline.errors import InputError
from pipeline.models.targets import TargetLogits, collate
from pipeline.train.batches import Batches, Shape, micro_batches
from pipeline.train.engine import set_learning_rate
from pipeline.train.log import Step, StepLog
from pipeline.train.loss import summed_loss
from pipeline.train.records import Record
from pipeline.train.schedule import learning_rate


@dataclass(frozen=True)
class Course:
    """What is trained on, in which order and how fast: all that decides the result, apart from the model."""

    records: Sequence[Record]
    batches: Batches
    shape: Shape
    training: Training
    seed: int

    @property
    def num_steps(self) -> int:
        return self.batches.num_steps

    def lr(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        return learning_rate(
            step, self.num_steps, self.training.lr, self.training.schedule, self.training.warmup_ratio
        )


Save = Callable[[int], object]


def train(
    engine: Any, picked: TargetLogits, course: Course, start: int, save: Save, log: StepLog, context: Context
) -> None:
    """Run steps `start` (from 0) to the end; `save(n)` is called after step n where a checkpoint is due, and
    after the last.

    Raises Preempted, after saving, if any rank was asked to stop; InputError if the loss is no longer a
    number.
    """
    every = course.training.checkpoint_every_steps
    with context.progress("training", course.num_steps, "steps") as progress:
        progress.advance(start)
        for done in range(start + 1, course.num_steps + 1):
            step = _timed_step(engine, picked, course, done - 1, context)
            if context.is_main:
                log.write(step)
                _report(engine, step)
            progress.advance(1, f"loss {step.loss:.4f}, {step.tokens_per_second:.0f} tokens/s")
            stopping = context.should_stop() and done < course.num_steps
            if stopping or done % every == 0 or done == course.num_steps:
                save(done)
            if stopping:
                raise Preempted(f"stopped after step {done} of {course.num_steps}")


def _timed_step(engine: Any, picked: TargetLogits, course: Course, index: int, context: Context) -> Step:
    started = time.perf_counter()
    batch = course.batches.at(index)
    lr = course.lr(index)
    # What chance there is (LoRA's dropout) depends on the step and the rank alone, so a resumed run repeats
    # it.
    torch.manual_seed(hash((course.seed, index, context.rank)))
    set_learning_rate(engine, lr)
    loss = optimizer_step(engine, picked, course, batch, context)
    if not isfinite(loss):
        raise InputError(f"the loss of step {index + 1} is {loss}: lower lr, or set max_grad_norm")
    norm = float(engine.get_global_grad_norm())
    if not isfinite(norm):  # DeepSpeed leaves such a step out without a word
        raise InputError(f"the gradient of step {index + 1} is {norm}: lower lr, or set max_grad_norm")
    tokens = sum(course.records[i].num_tokens for i in batch)
    seconds = time.perf_counter() - started
    epoch = index // course.batches.per_epoch + 1
    return Step(index + 1, epoch, loss, lr, norm, tokens, round(tokens / seconds, 1))


def optimizer_step(
    engine: Any, picked: TargetLogits, course: Course, batch: Sequence[int], context: Context
) -> float:
    """Forward, backward and update over `batch`; the mean loss over its targets before the update.
    Collective.

    DeepSpeed averages gradients over the ranks, so each rank's sum is weighed by ranks / targets of the whole
    batch. A rank that has no record left runs one with weight 0: under ZeRO-3 all must make the same number
    of passes.
    """
    num_targets = sum(course.records[i].num_targets for i in batch)
    total = torch.zeros((), dtype=torch.float64, device=context.device)
    for own in micro_batches(batch, course.shape, context.rank):
        part = collate([course.records[i].encoded for i in own or batch[:1]]).to(context.device)
        loss = summed_loss(engine, picked, part) * (1.0 if own else 0.0)
        engine.backward(loss * (course.shape.ranks / num_targets), scale_wrt_gas=False)
        engine.step()
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / num_targets


def _report(engine: Any, step: Step) -> None:
    """Hand the loss to whatever monitor (TensorBoard, W&B, CSV) the DeepSpeed config names; the rate it
    writes itself.
    """
    if engine.monitor.enabled:
        engine.monitor.write_events([("Train/Samples/train_loss", step.loss, engine.global_samples)])
