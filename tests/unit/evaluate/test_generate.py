"""Batched greedy decoding writes what `model.generate` writes for one question at a time, and stops where it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.evaluate.forward import Forward
from pipeline.evaluate.generate import Generator, Line

QUESTIONS = [
    "What is the capital of Kazakhstan?",
    "Who?",
    "What is the currency of Croatia?",
    "Who is the king of the United Kingdom, of Canada, of Australia and of New Zealand?",
    "King?",
    "What is the capital of the United Kingdom?",
]


def by_transformers(model: Any, tokenizer: Any, ids: list[int], eos: list[int], max_new_tokens: int) -> str:
    """One question at a time; the first line with text in it, cut from all that the model writes."""
    written = model.generate(torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0)
    new = [token for token in written[0, len(ids) :].tolist() if token not in eos]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text.lstrip().partition("\n")[0].rstrip()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_equals_transformers_one_at_a_time(subject: Any, architecture: str, batch_size: int) -> None:
    model, tokenizer, prompter = subject(architecture)
    prompts = [prompter.encode_question(question) for question in QUESTIONS]
    # A token that the model likes ends some of the answers early: those rows must leave the batch without disturbing others.
    early = model.generate(torch.tensor([prompts[0]]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0, -1].item()
    eos = [tokenizer.eos_token_id, early]
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, eos
    try:
        texts = Generator(Forward(model), tokenizer, batch_size, max_new_tokens=12).generate(prompts, QUESTIONS)
    finally:
        model.generation_config.eos_token_id = before
    expected = [by_transformers(model, tokenizer, ids, eos, 12) for ids in prompts]
    assert texts == expected
    assert len(set(texts)) > 3, "a model that always says the same would prove nothing"


class NewlineTokenizer:
    """Reads token `newline` as the end of a line, and every other one as a word."""

    eos_token_id = -1

    def __init__(self, newline: int) -> None:
        self.newline = newline

    def decode(self, ids: list[int]) -> str:
        return "".join("\n" if token == self.newline else f" {token}" for token in ids)

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [self.decode(ids) for ids in rows]


def test_stops_after_the_first_line(subject: Any) -> None:
    model, _, prompter = subject("llama")
    prompts = [prompter.encode_question(question) for question in QUESTIONS]
    written = [model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, len(ids) :] for ids in prompts]
    tokenizer = NewlineTokenizer(newline=written[0][2].item())
    lengths: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(len(output)))
    forward = Forward(model)
    texts = Generator(forward, tokenizer, batch_size=8, max_new_tokens=9).generate(prompts, QUESTIONS)  # type: ignore[arg-type]
    hook.remove()
    assert texts == [tokenizer.decode(row.tolist()).lstrip().partition("\n")[0].rstrip() for row in written]
    assert len(texts[0].split()) < 9
    assert sorted(lengths, reverse=True) == lengths
    assert lengths[0] == len(QUESTIONS) > lengths[-1], "a finished line leaves the batch"


@pytest.mark.parametrize(
    ("pieces", "goes_on"),
    [
        ([" Paris", ".\n"], [True, False]),
        (["\n", "\n", "Paris", "\n"], [True, True, True, False]),
        (["\nParis", " and"], [True, True]),
        ([" \n", "Paris\n"], [True, False]),
    ],
)
def test_a_line_ends_at_the_first_newline_after_text(pieces: list[str], goes_on: list[bool]) -> None:
    line = Line(budget=10)
    assert [line.add(7, piece, is_eos=False) for piece in pieces] == goes_on
    assert line.ids == [7] * len(pieces)


def test_a_line_ends_at_eos_and_at_its_budget() -> None:
    line = Line(budget=2)
    assert [line.add(7, "a", False), line.add(8, "b", False)] == [True, False]
    empty = Line(budget=2)
    assert not empty.add(0, "</s>", is_eos=True)
    assert empty.ids == []


def test_absolute_positions_are_never_exceeded() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_positions=8, n_embd=16, n_layer=1, n_head=2, vocab_size=50, eos_token_id=None, bos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    generator = Generator(Forward(model), NewlineTokenizer(-1), batch_size=4, max_new_tokens=20)  # type: ignore[arg-type]
    texts = generator.generate([[1] * 8, [2] * 7, [3, 4, 5]], ["a", "b", "c"])
    assert [len(text.split()) for text in texts] == [1, 2, 6]


def test_logits_that_are_not_numbers_name_the_record(subject: Any) -> None:
    model, tokenizer, prompter = subject("llama")
    prompts = [prompter.encode_question(question) for question in QUESTIONS[:3]]
    poisoned = next(token for token in prompts[1] if token not in prompts[0] + prompts[2])
    row = model.get_input_embeddings().weight.data[poisoned]
    before = row.clone()
    row.fill_(float("inf"))
    try:
        with pytest.raises(FloatingPointError, match="record second:"):
            Generator(Forward(model), tokenizer, 8, 3).generate(prompts, ["first", "second", "third"])
    finally:
        row.copy_(before)
