"""Teacher forcing: question and answer in one pass, and what the model would have said at each of the answer's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.evaluate.batching import batches_by_length
from pipeline.evaluate.forward import Forward, check_finite
from pipeline.evaluate.outputs import Forced
from pipeline.facts.prompts import Encoded
from pipeline.models.targets import collate


def force(forward: Forward, records: Sequence[Encoded], names: Sequence[str], batch_size: int) -> list[Forced]:
    """One `Forced` for each of `records`, whose owners' `names` are for errors.

    Padding is on the right, where a causal model cannot see it: results do not depend on the batch.
    """
    results: dict[int, Forced] = {}
    for chosen in batches_by_length([len(record.ids) for record in records], batch_size):
        batch = [records[i] for i in chosen]
        results.update(zip(chosen, _force_batch(forward, batch, [names[i] for i in chosen]), strict=True))
    return [results[i] for i in range(len(records))]


def _force_batch(forward: Forward, records: list[Encoded], names: list[str]) -> list[Forced]:
    batch = collate(records).to(forward.device)
    logits = forward.logits_at(batch.positions, batch.input_ids, batch.attention_mask)
    check_finite(logits, [name for name, count in zip(names, batch.counts, strict=True) for _ in range(count)])
    logprobs = (logits.gather(-1, batch.targets[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)).split(batch.counts)
    argmax = logits.argmax(-1).split(batch.counts)
    return [
        Forced(record.ids[record.answer_start :], likeliest.tolist(), logprob.mean().item())
        for record, likeliest, logprob in zip(records, argmax, logprobs, strict=True)
    ]
