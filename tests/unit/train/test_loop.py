"""The loss is the mean over the answers' tokens of the whole batch, however the batch is cut up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.facts.prompts import Encoded
from pipeline.models.targets import TargetLogits, collate
from pipeline.train.batches import Split, micro_batches
from pipeline.train.loop import summed_loss
from pipeline.train.model import build

RECORDS = [
    Encoded(list(range(5, 5 + length)), start) for length, start in [(4, 2), (5, 1), (6, 5), (8, 3), (9, 7)]
]


def reference(model: Any) -> torch.Tensor:
    """Record by record, with all logits, and transformers' own label convention."""
    total, count = torch.zeros(()), 0
    for record in RECORDS:
        ids = torch.tensor([record.ids])
        labels = ids.clone()
        labels[:, : record.answer_start] = -100
        num_targets = len(record.ids) - record.answer_start
        total = total + model(input_ids=ids, labels=labels).loss * num_targets
        count += num_targets
    return total / count


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_it_equals_the_full_logit_loss_and_gradient(tiny_model: Any, architecture: str) -> None:
    torch.manual_seed(0)
    model = build(tiny_model(architecture), "cpu", "fp32", gradient_checkpointing=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parameters = list(model.parameters())
    expected = reference(model)
    gradients = torch.autograd.grad(expected, parameters)
    num_targets = sum(len(record.ids) - record.answer_start for record in RECORDS)
    with TargetLogits(model) as picked:
        for ranks, micro_size in [(1, 8), (2, 1), (3, 2)]:
            split = Split.of(5, micro_size, ranks)
            parts = [part for rank in range(ranks) for part in micro_batches(range(5), split, rank) if part]
            losses = [summed_loss(model, picked, collate([RECORDS[i] for i in part])) for part in parts]
            total = torch.stack(losses).sum() / num_targets
            torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
            for found, wanted in zip(torch.autograd.grad(total, parameters), gradients, strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_models_own_dropout_is_off(tiny_model: Any, tmp_path: Any) -> None:
    import json
    import shutil

    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_model("gpt2"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5})
    )
    model = build(folder, "cpu", "fp32", gradient_checkpointing=True).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids).logits, model(ids).logits)
