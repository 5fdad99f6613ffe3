"""Logits picked before the projection equal the full ones at the same places, for every architecture."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.facts.prompts import Encoded
from pipeline.models.targets import TargetLogits, collate

LLAMA = LlamaConfig(
    vocab_size=97,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
)
GPT2 = GPT2Config(
    vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
)
BLOOM = BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2)
MODELS = {
    "llama": (LlamaForCausalLM, LLAMA),
    "gpt2": (GPT2LMHeadModel, GPT2),
    "bloom": (BloomForCausalLM, BLOOM),
}
RECORDS = [Encoded([5, 6, 7, 8, 9], 3), Encoded([11, 12, 13], 1), Encoded([21, 22, 23, 24, 25, 26, 27], 6)]


def test_collate_points_at_the_token_before_each_target() -> None:
    batch = collate(RECORDS)
    assert batch.input_ids.shape == (3, 7)
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 7]
    assert batch.positions.tolist() == [2, 3, 7, 8, 19]
    assert batch.targets.tolist() == [8, 9, 12, 13, 27]
    assert batch.counts == [2, 2, 1]


@pytest.mark.parametrize("name", MODELS)
def test_picked_logits_and_gradients_equal_the_full_ones(name: str) -> None:
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = kind(config)
    batch = collate(RECORDS)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    full = model(**inputs).logits.flatten(0, 1)[batch.positions]
    expected = torch.autograd.grad(full.logsumexp(-1).sum(), list(model.parameters()))
    with TargetLogits(model) as picked:
        with picked.at(batch.positions):
            logits = model(**inputs).logits
        assert model(**inputs).logits.shape == (3, 7, 97)  # outside `at` nothing changes
    assert logits.shape == (5, 97)
    torch.testing.assert_close(logits, full)
    found = torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert model(**inputs).logits.shape == (3, 7, 97)
