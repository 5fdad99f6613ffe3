"""The loss: cross-entropy on the answer and EOS alone, averaged over the answer tokens of the whole global
batch.

Each rank knows the whole batch, so it weighs its own sum by the batch's number of targets. The result does
then not depend on how the batch is cut into ranks and micro-batches, beyond rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from pipeline.models.targets import TargetBatch, TargetLogits


def summed_loss(model: Any, picked: TargetLogits, batch: TargetBatch) -> torch.Tensor:
    """Cross-entropy summed over `batch.targets`, a float32 scalar; logits are computed at the targets alone.

    `model` is called, so that it may be the DeepSpeed engine around the model that `picked` hooks into.
    """
    with picked.at(batch.positions):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
