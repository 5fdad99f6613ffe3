"""A batched respondent says what one unpadded record at a time says, by a full pass and by `generate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pipeline.config import Evaluate
from pipeline.errors import InputError
from pipeline.evaluate.outputs import Forced
from pipeline.evaluate.protocols import generation, probability, token
from pipeline.evaluate.respondent import Respondent
from pipeline.facts.fact import Fact
from pipeline.facts.prompts import Encoded

MAX_NEW_TOKENS = 12


def forced_naively(model: Any, record: Encoded) -> Forced:
    """One unpadded record, all logits, by the book."""
    with torch.no_grad():
        logprobs = model(torch.tensor([record.ids])).logits[0].log_softmax(-1)
    targets = record.ids[record.answer_start :]
    predicted = logprobs[record.answer_start - 1 : -1]
    logprob = sum(predicted[i, token].item() for i, token in enumerate(targets)) / len(targets)
    return Forced(targets, predicted.argmax(-1).tolist(), logprob)


def generated_naively(model: Any, tokenizer: Any, ids: list[int], eos: list[int]) -> str:
    """One question at a time; the first line with text in it, cut from all that the model writes."""
    written = model.generate(
        torch.tensor([ids]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    new = [token for token in written[0, len(ids) :].tolist() if token not in eos]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text.lstrip().partition("\n")[0].rstrip()


def respondent(subject: Any, batch_size: int) -> Respondent:
    return Respondent(
        subject.model,
        subject.tokenizer,
        subject.prompter,
        Evaluate(batch_size=batch_size, max_new_tokens=MAX_NEW_TOKENS),
    )


@contextmanager
def ended_by(model: Any, eos: list[int]) -> Iterator[None]:
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, eos
    try:
        yield
    finally:
        model.generation_config.eos_token_id = before


@contextmanager
def poisoned(model: Any, token: int) -> Iterator[None]:
    """A model for which `token` means NaN."""
    row = model.get_input_embeddings().weight.data[token]
    before = row.clone()
    row.fill_(float("nan"))
    try:
        yield
    finally:
        row.copy_(before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_forced_answers_equal_single_records(
    subject: Any, facts: list[Fact], architecture: str, batch_size: int
) -> None:
    one = subject(architecture)
    asked = respondent(one, batch_size)
    asked.ask(facts)
    pairs = {pair for fact in facts for pair in [*token.pairs(fact), *probability.pairs(fact)]}
    assert set(asked.outputs.forced) == pairs
    expected = {pair: forced_naively(one.model, one.prompter.encode(*pair, eos=False)) for pair in pairs}
    assert len({tuple(forced.argmax) for forced in expected.values()}) > 5, (
        "a model that always says the same would prove nothing"
    )
    for pair, got in asked.outputs.forced.items():
        assert (got.targets, got.argmax) == (expected[pair].targets, expected[pair].argmax)
        assert got.logprob == pytest.approx(expected[pair].logprob, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_generations_equal_single_questions(
    subject: Any, facts: list[Fact], architecture: str, batch_size: int
) -> None:
    one = subject(architecture)
    # A token that the model likes ends some lines early: they leave the batch, and others join it.
    prompt = one.prompter.encode_question(facts[0].prompt)
    early = one.model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0)[
        0, -1
    ].item()
    eos = [one.tokenizer.eos_token_id, early]
    with ended_by(one.model, eos):
        asked = respondent(one, batch_size)
        asked.ask(facts)
    questions = {question for fact in facts for question in generation.questions(fact)}
    expected = {
        question: generated_naively(one.model, one.tokenizer, one.prompter.encode_question(question), eos)
        for question in questions
    }
    assert asked.outputs.generated == expected
    assert len(set(expected.values())) > 5, "a model that always says the same would prove nothing"


def test_a_question_is_read_once_for_all_its_answers_and_records(subject: Any, facts: list[Fact]) -> None:
    one = subject("llama")
    read: Counter[tuple[int, ...]] = Counter()

    def count(module: Any, args: Any, arguments: Any) -> None:
        mask = arguments["attention_mask"]
        if mask.shape == arguments["input_ids"].shape:
            read.update(
                tuple(ids[kept == 1].tolist()) for ids, kept in zip(arguments["input_ids"], mask, strict=True)
            )

    hook = one.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        asked = respondent(one, 2)
        asked.ask(facts)
        asked.ask(facts[1:])
    finally:
        hook.remove()
    questions = {question for fact in facts for question in generation.questions(fact)}
    assert read == Counter({tuple(one.prompter.encode_question(question)): 1 for question in questions})


def test_logits_are_computed_where_they_are_needed_only(subject: Any, facts: list[Fact]) -> None:
    one = subject("llama")
    num_logits = 0

    def count(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal num_logits
        num_logits += output.numel() // output.shape[-1]

    asked = Respondent(one.model, one.tokenizer, one.prompter, Evaluate(protocols=["token"]))
    hook = one.model.lm_head.register_forward_hook(count)
    try:
        asked.ask(facts)
    finally:
        hook.remove()
    questions = {question for question, _ in asked.outputs.forced}
    later_tokens = sum(len(forced.targets) - 1 for forced in asked.outputs.forced.values())
    assert num_logits == len(questions) + later_tokens


def test_a_text_beyond_the_last_position_names_its_record(subject: Any) -> None:
    one = subject("gpt2")
    long = Fact(id="row 7", prompt="Who? " * 600, subject="", old_answers=[], new_answer="Charles")
    with pytest.raises(InputError, match=r"record row 7: .* 1024 positions"):
        respondent(one, 2).ask([long])


def test_generation_stays_within_the_last_position(subject: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    one = subject("gpt2")
    question = Fact(id="who", prompt="Who is the king?", subject="", old_answers=[], new_answer="")
    length = len(one.prompter.encode_question(question.prompt))
    torch.manual_seed(0)
    vocabulary: dict[str, Any] = {
        "vocab_size": len(one.tokenizer),
        "eos_token_id": None,
        "bos_token_id": None,
    }
    model = GPT2LMHeadModel(
        GPT2Config(n_positions=length + 1, n_embd=16, n_layer=1, n_head=2, **vocabulary)
    ).eval()
    asked = Respondent(
        model, one.tokenizer, one.prompter, Evaluate(protocols=["generation"], max_new_tokens=9)
    )
    shapes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(len(output)))
    asked.ask([question])
    assert len(shapes) == 2, "the question's last token and one more: there is no further position"


@pytest.mark.parametrize("protocol", ["token", "generation"])
def test_logits_that_are_not_numbers_name_the_record(subject: Any, protocol: Any) -> None:
    one = subject("llama")
    facts = [
        Fact(name, prompt, "", [], "Astana")
        for name, prompt in (("first", "Who?"), ("second", "The currency of Croatia?"))
    ]
    first, second = (set(one.prompter.encode_question(fact.prompt)) for fact in facts)
    with poisoned(one.model, min(second - first)):
        asked = Respondent(one.model, one.tokenizer, one.prompter, Evaluate(protocols=[protocol]))
        with pytest.raises(FloatingPointError, match=r"record second: .*not finite"):
            asked.ask(facts)
