"""The training loop: optimizer steps over a course's batches, logged, saved, and stopped when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from pipeline.context import Context, Preempted
from pipeline.errors import InputError
from pipeline.models.targets import TargetBatch, TargetLogits, collate
from pipeline.train.batches import micro_batches
from pipeline.train.course import Course
from pipeline.train.step_log import Step, StepLog
from pipeline.train.zero_engine import ZeroEngine

Save = Callable[[int], object]


def train(
    engine: ZeroEngine,
    picked: TargetLogits,
    course: Course,
    start: int,
    save: Save,
    log: StepLog,
    context: Context,
) -> None:
    """Run steps `start` (from 0) to the end. Collective.

    `save(n)` is called after step n where a checkpoint is due, and after the last. Raises Preempted, after
    saving, if any rank was asked to stop; InputError if the loss is no longer a number.
    """
    every = course.training.checkpoint_every_steps
    with context.progress("training", course.num_steps, "steps") as progress:
        progress.advance(start)
        for done in range(start + 1, course.num_steps + 1):
            step = _timed_step(engine, picked, course, done - 1, context)
            if context.is_main:
                log.write(step)
                engine.report_loss(step.loss)
            progress.advance(1, f"loss {step.loss:.4f}, {step.tokens_per_second:.0f} tokens/s")
            stopping = context.should_stop() and done < course.num_steps
            if stopping or done % every == 0 or done == course.num_steps:
                save(done)
            if stopping:
                raise Preempted(f"stopped after step {done} of {course.num_steps}")


def _timed_step(
    engine: ZeroEngine, picked: TargetLogits, course: Course, index: int, context: Context
) -> Step:
    started = time.perf_counter()
    batch = course.batches.at(index)
    lr = course.lr(index)
    # LoRA's dropout draws by the step and the rank alone, so a resumed run repeats an undisturbed one.
    torch.manual_seed(hash((course.seed, index, context.rank)))
    engine.set_learning_rate(lr)
    loss = optimizer_step(engine, picked, course, batch, context)
    if not isfinite(loss):
        raise InputError(f"the loss of step {index + 1} is {loss}: lower lr, or set max_grad_norm")
    norm = engine.grad_norm
    if not isfinite(norm):  # DeepSpeed leaves such a step out without a word
        raise InputError(f"the gradient of step {index + 1} is {norm}: lower lr, or set max_grad_norm")
    tokens = sum(course.records[i].num_tokens for i in batch)
    seconds = time.perf_counter() - started
    epoch = index // course.batches.per_epoch + 1
    return Step(index + 1, epoch, loss, lr, norm, tokens, round(tokens / seconds, 1))


def optimizer_step(
    engine: ZeroEngine, picked: TargetLogits, course: Course, batch: Sequence[int], context: Context
) -> float:
    """Forward, backward and update over `batch`; its mean loss per target, before the update. Collective.

    Each rank knows the whole batch, so it weighs its own sum by the batch's number of targets. The result
    then does not depend on how the batch is split, beyond rounding. DeepSpeed averages over the ranks, hence
    the factor. A rank without a record runs one with weight 0: under ZeRO-3 all must make as many passes.
    """
    num_targets = sum(course.records[i].num_targets for i in batch)
    total = torch.zeros((), dtype=torch.float64, device=context.device)
    for own in micro_batches(batch, course.split, context.rank):
        part = collate([course.records[i].encoded for i in own or batch[:1]]).to(context.device)
        loss = summed_loss(engine, picked, part) * (1.0 if own else 0.0)
        engine.backward(loss * (course.split.ranks / num_targets))
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / num_targets


def summed_loss(model: Callable[..., Any], picked: TargetLogits, batch: TargetBatch) -> torch.Tensor:
    """Cross-entropy in nats, summed over `batch.targets`: a float32 scalar.

    Logits are computed at the targets alone. `model` is called, so it may be the engine around the model that
    `picked` hooks into.
    """
    with picked.at(batch.positions):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
