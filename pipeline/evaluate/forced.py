"""Teacher forcing: answers put into the model's mouth, and what it would have said at each of their
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.evaluate.batching import batches_by_length, pad
from pipeline.evaluate.forward import Reading
from pipeline.evaluate.outputs import Forced


def force(reading: Reading, answers: Sequence[tuple[int, list[int]]], batch_size: int) -> list[Forced]:
    """One `Forced` for each of `answers`: (row of the question in `reading`, the answer's token ids).

    Their padding is on the right, where a causal model cannot see it: results do not depend on the batch.
    """
    results: dict[int, Forced] = {}
    for chosen in batches_by_length([len(ids) for _, ids in answers], batch_size):
        batch = [answers[i] for i in chosen]
        results.update(
            zip(
                chosen,
                _force_batch(reading.select([row for row, _ in batch]), [ids for _, ids in batch]),
                strict=True,
            )
        )
    return [results[i] for i in range(len(answers))]


def _force_batch(reading: Reading, answers: list[list[int]]) -> list[Forced]:
    """`answers[i]` follows the i-th text of `reading`."""
    predictions = [logits[None] for logits in reading.logits]
    if max(len(ids) for ids in answers) > 1:
        # The last token predicts nothing that is asked for, so it is not read.
        rest = _following(reading, [ids[:-1] for ids in answers])
        predictions = [torch.cat(pair) for pair in zip(predictions, rest, strict=True)]
    return [_judge(logits, ids) for logits, ids in zip(predictions, answers, strict=True)]


def _following(reading: Reading, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits (len(row), vocabulary) after each token of each row."""
    input_ids, mask = (tensor.to(reading.logits.device) for tensor in pad(rows, "right"))
    logits = reading.extend(input_ids, mask, mask.flatten().nonzero().squeeze(-1))
    return list(logits.split([len(row) for row in rows]))


def _judge(logits: torch.Tensor, ids: list[int]) -> Forced:
    targets = torch.tensor(ids, device=logits.device)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return Forced(ids, logits.argmax(-1).tolist(), logprobs.mean().item())
