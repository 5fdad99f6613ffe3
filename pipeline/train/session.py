"""A live DeepSpeed engine: opened once, filled from any tensor source, and trained on one course or several.

What a second course gives in it is what it would give in a new engine, bit for bit: losses and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pipeline.context import Context, log
from pipeline.models.targets import TargetLogits
from pipeline.train.checkpoint import Checkpoints, Saved
from pipeline.train.course import Course
from pipeline.train.job import Job
from pipeline.train.loop import train
from pipeline.train.lora import InitialAdapter, add_adapter
from pipeline.train.masters import Binding
from pipeline.train.model import Places, build, skeleton
from pipeline.train.step_log import StepLog
from pipeline.train.zero_engine import ZeroEngine, free_memory, partitioned_models, process_state
from pipeline.weights.source import TensorSource


class Session:
    """The model of a job under a DeepSpeed engine, its weights still to be filled. Collective throughout.

    ```
    with Session(job, context) as session:
        session.fill(source, course.seed)
        session.run(course, checkpoints, step_log)
        session.reset_optimizer()
        session.fill(other_source, other_course.seed)
        session.run(other_course, other_checkpoints, other_log)
    ```
    """

    def __init__(self, job: Job, context: Context) -> None:
        self._context = context
        self._settings = job.engine_settings
        self._split = job.course.split
        plain = skeleton(job.folder)
        with ExitStack() as stack:
            stack.enter_context(process_state(job.ready))
            with partitioned_models(job.ready):
                self._model: Any = build(
                    job.folder, context.device, job.training.precision, job.training.gradient_checkpointing
                )
                self._places = Places(self._model, plain)
                if job.adapter is not None:
                    self._model = add_adapter(self._model, job.adapter)
            self._has_adapter = job.adapter is not None
            self._picked = stack.enter_context(TargetLogits(self._model))
            self._engine = ZeroEngine(self._model, job.ready)
            stack.callback(self._engine.close)
            self._open = stack.pop_all()
        log.info(
            "%s: %d of %d parameters, ZeRO-%d",
            type(self._model).__name__,
            job.num_trained,
            job.num_parameters,
            job.ready.zero_stage,
        )

    def fits(self, job: Job) -> bool:
        """Whether `job` would build the same engine around the same model."""
        # A monitor takes an engine for one run: a second course would go on where the first curve ended.
        return not job.ready.has_monitor and self._settings == job.engine_settings

    def fill(self, source: TensorSource, seed: int) -> None:
        """Take all weights from `source`, and LoRA's first matrices from `seed`.

        Trained ones enter the fp32 masters bit for bit, frozen ones in the model's own dtype. Raises
        InputError naming what the source lacks, or has in another shape.
        """
        self._engine.fill(self._places.bind(source) + self._first_matrices(seed))

    def resume(self, source: TensorSource, checkpoints: Checkpoints, saved: Saved) -> None:
        """Take frozen weights from `source`, all else from the checkpoint. Raises as `Checkpoints.load`."""
        bindings = self._places.bind(source)
        self._engine.fill([binding for binding in bindings if not binding.parameter.requires_grad])
        checkpoints.load(self._engine, saved)

    def run(self, course: Course, checkpoints: Checkpoints, step_log: StepLog, start: int = 0) -> None:
        """Train on `course` from step `start` (from 0) to its end, when the last checkpoint is written.

        Raises Preempted, after saving, when asked to stop.
        """
        assert course.split == self._split, "the engine steps after as many micro-steps as its config says"

        def save(done: int) -> None:
            self.save(checkpoints, done, with_moments=done < course.num_steps)

        with step_log:
            if self._context.is_main:
                step_log.open(start)
            train(self._engine, self._picked, course, start, save, step_log, self._context)

    def save(self, checkpoints: Checkpoints, step: int, with_moments: bool = True) -> Saved:
        """Write a checkpoint of the state after `step` steps. Raises OSError if the disk is full."""
        return checkpoints.save(self._engine, step, with_moments)

    def reset_optimizer(self) -> None:
        """Forget AdamW's moments and step count, as before another course."""
        self._engine.reset_optimizer()

    def close(self) -> None:
        """Free the engine, the model and their memory; the session is of no use afterwards."""
        self._open.close()
        del self._engine, self._picked, self._places, self._model
        free_memory()

    def _first_matrices(self, seed: int) -> list[Binding]:
        if not self._has_adapter:
            return []
        initial = InitialAdapter(self._model, seed)
        trained = dict(self._model.named_parameters())
        return [Binding(trained[name], initial, name) for name in initial.tensors]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Handover:
    """Passes one live session from a training step to the next. Close it before others need the memory.

    `flearn run` has no use for it: an evaluation, which wants the memory, lies between two fine-tunings.
    """

    def __init__(self) -> None:
        self._session: Session | None = None

    @contextmanager
    def session(self, job: Job, context: Context) -> Iterator[Session]:
        """A session for `job`, its optimizer as new: the open one, if it fits; else that one is closed first.

        It stays open on leaving, but not on an error: a course that broke off may have left gradients.
        """
        if self._session is not None and not self._session.fits(job):
            self.close()
        if self._session is None:
            self._session = Session(job, context)
        self._session.reset_optimizer()
        try:
            yield self._session
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the session, if one is open."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> Handover:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
