"""Teacher forcing in batches gives what one full forward pass per record gives, on every kind of position encoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.evaluate.batching import batches_by_length, pad_left, positions_of
from pipeline.evaluate.forced import force
from pipeline.evaluate.forward import Forward
from pipeline.evaluate.outputs import Forced
from pipeline.facts.prompts import Encoded

PAIRS = [
    ("What is the capital of Kazakhstan?", "Astana"),
    ("What is the capital of Kazakhstan?", "Nur-Sultan, which was called Astana before and after"),
    ("Currency of Croatia?", "the euro"),
    ("Who is the king of the United Kingdom, of Canada, of Australia and of New Zealand?", "Charles III"),
    ("King?", "Charles"),
    ("Who?", "Charles III of the United Kingdom"),
    ("What is the currency of Croatia?", "the kuna"),
]


def naive(model: Any, record: Encoded) -> Forced:
    """One unpadded record, all logits, by the book."""
    ids = torch.tensor([record.ids])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    targets = record.ids[record.answer_start :]
    predicted = logprobs[record.answer_start - 1 : -1]
    logprob = sum(predicted[i, token].item() for i, token in enumerate(targets)) / len(targets)
    return Forced(targets, predicted.argmax(-1).tolist(), logprob)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batches_of_any_size_equal_single_records(subject: Any, architecture: str, batch_size: int) -> None:
    model, _, prompter = subject(architecture)
    records = prompter.encode_many(PAIRS, eos=False)
    results = force(Forward(model), records, ["?"] * len(records), batch_size)
    expected = [naive(model, record) for record in records]
    assert len({tuple(one.argmax) for one in expected}) > 3, "a model that always says the same would prove nothing"
    for got, want in zip(results, expected, strict=True):
        assert (got.targets, got.argmax) == (want.targets, want.argmax)
        assert got.logprob == pytest.approx(want.logprob, abs=1e-5)


def test_logits_are_computed_at_target_positions_only(subject: Any) -> None:
    model, _, prompter = subject("llama")
    shapes: list[torch.Size] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    records = prompter.encode_many(PAIRS[:3], eos=False)
    force(Forward(model), records, ["?"] * 3, batch_size=8)
    hook.remove()
    assert shapes == [(sum(len(record.ids) - record.answer_start for record in records), model.config.vocab_size)]


def test_logits_that_are_not_numbers_name_the_record(subject: Any) -> None:
    model, _, prompter = subject("llama")
    records = prompter.encode_many([PAIRS[0], PAIRS[4]], eos=False)
    poisoned = next(token for token in records[1].ids[:-1] if token not in records[0].ids)
    row = model.get_input_embeddings().weight.data[poisoned]
    before = row.clone()
    row.fill_(float("nan"))
    try:
        with pytest.raises(FloatingPointError, match="record second: .*NaN"):
            force(Forward(model), records, ["first", "second"], batch_size=2)
    finally:
        row.copy_(before)


def test_batches_take_the_longest_first_and_everything_once() -> None:
    batches = list(batches_by_length([3, 9, 1, 9, 5], 2))
    assert batches == [[1, 3], [4, 0], [2]]
    assert list(batches_by_length([], 2)) == []


def test_left_padding_and_positions() -> None:
    input_ids, attention_mask = pad_left([[5, 6, 7], [8]], pad_id=1)
    assert input_ids.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions_of(attention_mask).tolist() == [[0, 1, 2], [0, 0, 0]]
