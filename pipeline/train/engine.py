"""The DeepSpeed engine: made for one training, and cleared away after it, for one process runs many trainings
in a row.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from pipeline.config import Training
from pipeline.train.deepspeed_config import Ready

_LRU_CACHED = type(lru_cache(len))


@contextmanager
def session(ready: Ready) -> Iterator[None]:
    """DeepSpeed's process-wide state as a training wants it; put back on leaving. torch.distributed must be
    initialised.

    While it lasts and `ready` asks for ZeRO-3, transformers makes models partitioned from the start.
    """
    _start_deepspeed()
    # ZeRO-3 replaces this function for good, also for models that have nothing to do with it.
    linear = functional.linear
    hold = _announce_zero3(ready.config) if ready.zero_stage == 3 else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about calls that DeepSpeed and transformers make
            yield
    finally:
        if hold is not None:
            _forget_zero3()
        functional.linear = linear
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _start_deepspeed() -> None:
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # On a CPU DeepSpeed compiles an operator that training never calls, and fails where there is no
        # compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def _announce_zero3(config: dict[str, Any]) -> object:
    """transformers looks for this object when it makes a model, through a weak reference: it must be kept."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


def _forget_zero3() -> None:
    """Let go of what keeps a ZeRO-3 model, and by it the engine and all its memory, alive for good."""
    from deepspeed.runtime.zero import parameter_offload
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    parameter_offload.FWD_MODULE_STACK.clear()
    for cached in gc.get_objects():
        if isinstance(cached, _LRU_CACHED) and str(cached.__module__).startswith("deepspeed."):
            cached.cache_clear()


@contextmanager
def engine_for(model: Any, ready: Ready, training: Training) -> Iterator[Any]:
    """The DeepSpeed engine that trains those parameters of `model` that require gradients, with torch's
    AdamW.

    One group of parameters: the weight decay holds for all of them.
    """
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=training.lr,
        betas=ready.adam.betas,
        eps=ready.adam.eps,
        weight_decay=training.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ready.config, dist_init_required=False
    )
    engine.train()
    try:
        yield engine
    finally:
        engine.destroy()


def drop_moments(engine: Any) -> None:
    """Let go of AdamW's moments. After the last step: a checkpoint then holds the masters alone, which is all
    that is read of it.
    """
    for state in engine.optimizer.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state.pop(name, None)


def set_learning_rate(engine: Any, lr: float) -> None:
    """The rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
