"""DeepSpeed's engine behind a few methods of our own; with masters.py, the only file that looks inside it.

The names of DeepSpeed's fields are those of 0.19. The integration tests hold what is done with them: every
master compared element by element, and every checkpoint's bytes, at ZeRO 1, 2 and 3.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pipeline.train import masters
from pipeline.train.deepspeed_config import Ready
from pipeline.train.masters import Binding

_LRU_CACHED = type(lru_cache(len))
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """Trains those parameters of a model that require gradients, with torch's AdamW.

    Open it inside `process_state`. All ranks call its methods together.
    """

    def __init__(self, model: torch.nn.Module, ready: Ready) -> None:
        import deepspeed

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # One group of parameters: the weight decay holds for all of them. The rate is set before each step.
        self._adam = torch.optim.AdamW(trained, lr=0.0, fused=True, **asdict(ready.adam))
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._adam, config=ready.config, dist_init_required=False
        )
        self._engine.train()
        self._has_frozen = any(not parameter.requires_grad for parameter in model.parameters())

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward pass."""
        return self._engine(**inputs)

    def fill(self, bindings: Iterable[Binding]) -> None:
        """Set trained parameters' masters, bit for bit in float32; frozen weights in the model's dtype."""
        masters.load(self._engine, bindings)

    def set_learning_rate(self, lr: float) -> None:
        """The rate of the next optimizer step."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: torch.Tensor) -> None:
        """One micro-step's backward pass; with the last one of a batch, the optimizer's step.

        DeepSpeed averages gradients over the ranks and, by `scale_wrt_gas`, over micro-steps. Ours are
        weighed already, by the number of targets.
        """
        self._engine.backward(loss, scale_wrt_gas=False)
        self._engine.step()

    @property
    def grad_norm(self) -> float:
        """L2 norm of the whole gradient of the last step, before clipping."""
        return float(self._engine.get_global_grad_norm())

    def report_loss(self, loss: float) -> None:
        """Tell the config's monitors (TensorBoard, W&B, CSV); of the rate DeepSpeed tells them itself."""
        if self._engine.monitor.enabled:
            events = [("Train/Samples/train_loss", loss, self._engine.global_samples)]
            self._engine.monitor.write_events(events)

    def save(self, folder: Path, tag: str, with_moments: bool) -> None:
        """Write the ranks' partition files to `folder`/`tag`. Frozen weights are the base's, and left out.

        Without moments only the masters can be read again: enough for a training that is over.
        """
        with self._moments_kept(with_moments):
            done = self._engine.save_checkpoint(
                str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=self._has_frozen
            )
        if not done:
            raise RuntimeError(f"{folder / tag}: DeepSpeed did not save the checkpoint")

    def load(self, folder: Path, tag: str) -> int | None:
        """Read masters, moments and trained weights. Returns the steps done; None if nothing was there."""
        path, _ = self._engine.load_checkpoint(
            str(folder), tag=tag, load_module_strict=not self._has_frozen, load_lr_scheduler_states=False
        )
        return None if path is None else self._engine.global_steps

    def reset_optimizer(self) -> None:
        """Moments, step counts and DeepSpeed's own counters as in a new engine.

        Moments are zeroed in place: ZeRO-1 and 2 link them to the parameters at the first step, once, and
        would keep the memory of any that were dropped.
        """
        for state in self._adam.state.values():
            for value in state.values():
                value.zero_()
        # They go into each checkpoint, and the monitors count in samples.
        self._engine.global_steps = self._engine.global_samples = 0
        self._engine.micro_steps = self._engine.skipped_steps = 0

    def close(self) -> None:
        """Take the hooks off the model and the entries out of DeepSpeed's tables; see `free_memory`."""
        self._engine.destroy()

    @contextmanager
    def _moments_kept(self, kept: bool) -> Iterator[None]:
        """Within, AdamW's state has its moments only if they are to be kept."""
        states = [] if kept else list(self._adam.state.values())
        taken = [{name: state.pop(name) for name in _MOMENTS if name in state} for state in states]
        try:
            yield
        finally:
            for state, moments in zip(states, taken, strict=True):
                state.update(moments)


@contextmanager
def process_state(ready: Ready) -> Iterator[None]:
    """DeepSpeed's process-wide state as a training wants it, put back on leaving.

    torch.distributed must be initialised. On leaving, what keeps a closed engine alive lets go of it.
    """
    _start_deepspeed()
    linear = functional.linear  # ZeRO-3 replaces it for good, for models that have nothing to do with it too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of calls that DeepSpeed and transformers make
            yield
    finally:
        functional.linear = linear
        if ready.zero_stage == 3:
            _forget_zero3()


def _start_deepspeed() -> None:
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # On a CPU DeepSpeed compiles an operator that training never calls, and fails without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def _forget_zero3() -> None:
    """Empty the tables by which DeepSpeed keeps a ZeRO-3 model, its engine and all their memory, for good."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
    for cached in gc.get_objects():
        if isinstance(cached, _LRU_CACHED) and str(cached.__module__).startswith("deepspeed."):
            cached.cache_clear()


@contextmanager
def partitioned_models(ready: Ready) -> Iterator[None]:
    """Within, if `ready` asks for ZeRO-3, transformers makes models whose parameters are partitioned at once.

    Made whole first, a large model would not fit a rank. Models for other ends must not be made in here.
    """
    if ready.zero_stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(ready.config)  # transformers looks for it through a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


def free_memory() -> None:
    """Give back the memory of an engine that nobody holds any more: its parts refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
