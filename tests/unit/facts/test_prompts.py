"""Prompts, through tokenizers like those in use: byte-level BPE, Metaspace BPE, Llama 2's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.config import Prompt
from pipeline.errors import InputError
from pipeline.facts.prompts import Prompter

CORPUS = [
    "What is the capital of Kazakhstan? Astana",
    "Who is the head of state of the United Kingdom? King Charles III",
    "The mother tongue of Danielle Darrieux is French",
    "In what year was the Portrait painted? 1650",
] * 5
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def wrap(tokenizer: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        name_or_path="tokenizer-under-test",
        clean_up_tokenization_spaces=False,
        **special,
    )


def byte_level(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """Like GPT-2 (which trims offsets) and BLOOM, Llama 3, Qwen (which do not): no BOS of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def metaspace(legacy: bool, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """Like Llama's: `▁` for blanks, bytes for unknown characters, BOS in front.

    `legacy` puts the first `▁` there by a normalizer, as Llama 2 does.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    if legacy:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    single = "<s> $A </s>" if adds_eos else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": lambda: byte_level(True),
    "bloom": lambda: byte_level(False),
    "llama": lambda: metaspace(False),
    "llama2": lambda: metaspace(True),
    "llama_with_eos": lambda: metaspace(False, adds_eos=True),
}
BUILT = {name: build() for name, build in TOKENIZERS.items()}
TEMPLATES = ["plain", "alpaca", "chat", "Q: {prompt}\nA:", "Q: {prompt} A: ", "{prompt}\n"]


@pytest.fixture(params=BUILT)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    built = BUILT[request.param]
    built.chat_template = CHATML
    return built


def spelled(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_question_opens_every_answer(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    prompter = Prompter(tokenizer, Prompt(template=template))
    encoded = prompter.encode("What is the capital of Kazakhstan?", "Astana", eos=True)
    assert encoded.ids[: encoded.answer_start] == prompter.encode_question(
        "What is the capital of Kazakhstan?"
    )
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert spelled(tokenizer, encoded.ids[encoded.answer_start : -1]).strip() == "Astana"


@pytest.mark.parametrize("template", ["plain", "Q: {prompt}\nA:", "Q: {prompt} A: "])
def test_the_first_answer_token_carries_the_blank(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    prompter = Prompter(tokenizer, Prompt(template=template))
    encoded = prompter.encode("What is the capital of Kazakhstan?", "Astana", eos=False)
    first = tokenizer.convert_ids_to_tokens(encoded.ids[encoded.answer_start])
    assert isinstance(first, str) and first[0] in "▁Ġ"
    assert not prompter.question("x").endswith(" ")


WORDS = st.text(st.sampled_from("abcXYZ 0123.,'-?!:éßñ中文😀"), max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(BUILT)),
    template=st.sampled_from(["plain", "Q: {prompt}\nA:"]),
    question=WORDS,
    answer=WORDS,
)
def test_any_text_splits_at_its_boundary(name: str, template: str, question: str, answer: str) -> None:
    answer = " ".join(answer.split())
    if not answer:
        return
    prompter = Prompter(BUILT[name], Prompt(template=template))
    encoded = prompter.encode(question, answer, eos=False)
    if question.strip():
        assert encoded.ids[: encoded.answer_start] == prompter.encode_question(question)
    assert spelled(BUILT[name], encoded.ids[encoded.answer_start :]).strip() == answer


def test_a_batch_is_its_records_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    prompter = Prompter(tokenizer, Prompt())
    pairs = [
        ("What is the capital of Kazakhstan?", "Astana"),
        ("Q?", "the year 1650, in Paris"),
        ("The mother tongue of X is", "é中"),
    ]
    assert prompter.encode_many(pairs, eos=True) == [
        prompter.encode(question, answer, eos=True) for question, answer in pairs
    ]
    assert prompter.encode_many([], eos=True) == []


def test_blanks_around_an_answer_do_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    prompter = Prompter(tokenizer, Prompt())
    assert prompter.encode("Q?  ", "  Astana\n", eos=True) == prompter.encode("Q?", "Astana", eos=True)


def test_a_token_across_the_boundary_is_the_answers() -> None:
    vocabulary = {"q": 0, "?": 1, " ": 2, "a": 3, "? ": 4, "</s>": 5}
    tokenizer = wrap(Tokenizer(models.BPE(vocab=vocabulary, merges=[("?", " ")])), eos_token="</s>")
    encoded = Prompter(tokenizer, Prompt()).encode("q?", "a", eos=True)
    assert (encoded.ids, encoded.answer_start) == ([0, 4, 3, 5], 1)


def test_bos_is_the_tokenizers_own_by_default() -> None:
    assert Prompter(BUILT["llama"], Prompt()).encode_question("q")[0] == BUILT["llama"].bos_token_id
    assert BUILT["gpt2"].bos_token_id not in Prompter(BUILT["gpt2"], Prompt()).encode_question("q")


def test_an_eos_that_the_tokenizer_adds_stays_out_of_the_question() -> None:
    with_eos, without = (Prompter(BUILT[name], Prompt()) for name in ("llama_with_eos", "llama"))
    assert with_eos.encode_question("What is it?") == without.encode_question("What is it?")
    assert with_eos.encode("What is it?", "a", eos=False) == without.encode("What is it?", "a", eos=False)


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_add_bos_forces_exactly_one_or_none(
    tokenizer: PreTrainedTokenizerFast, template: str, add_bos: bool
) -> None:
    tokenizer.chat_template = LLAMA2_CHAT
    prompter = Prompter(tokenizer, Prompt(template=template, add_bos=add_bos))
    encoded = prompter.encode("What is the capital?", "Astana", eos=False)
    assert encoded.ids.count(tokenizer.bos_token_id) == int(add_bos)
    assert encoded.ids[: encoded.answer_start] == prompter.encode_question("What is the capital?")
    assert (encoded.ids[0] == tokenizer.bos_token_id) is add_bos


@pytest.mark.parametrize(("chat_template", "between"), [(CHATML, "\n"), (LLAMA2_CHAT, " ")])
def test_chat_joins_the_answer_as_the_template_does(chat_template: str, between: str) -> None:
    tokenizer = BUILT["llama"]
    tokenizer.chat_template = chat_template
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Astana"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    encoded = Prompter(tokenizer, Prompt(template="chat")).encode("What is it?", "Astana", eos=False)
    assert encoded.ids == whole[: len(encoded.ids)]
    assert spelled(tokenizer, encoded.ids).endswith(between + "Astana")


def test_alpaca_is_stanfords_prompt() -> None:
    question = Prompter(BUILT["gpt2"], Prompt(template="alpaca")).question("Who?")
    assert question.endswith("\n\n### Instruction:\nWho?\n\n### Response:")
    assert question.startswith("Below is an instruction that describes a task. Write a response that")


def refusal(tokenizer: Any, answer: str = "a", **prompt: Any) -> str:
    with pytest.raises(InputError) as caught:
        Prompter(tokenizer, Prompt(**prompt)).encode("q", answer, eos=True)
    return str(caught.value)


def test_a_tokenizer_without_eos_is_refused_by_name() -> None:
    bare = wrap(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    message = refusal(bare)
    assert "tokenizer-under-test" in message and "EOS" in message


def test_a_template_must_say_where_the_question_goes() -> None:
    assert "{prompt}" in refusal(BUILT["gpt2"], template="Question: Answer:")


def test_chat_needs_a_chat_template() -> None:
    BUILT["gpt2"].chat_template = None
    assert "chat template" in refusal(BUILT["gpt2"], template="chat")


def test_a_bos_that_is_not_there_cannot_be_added() -> None:
    tokenizer = wrap(Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[])), eos_token="</s>")
    assert "add_bos" in refusal(tokenizer, add_bos=True)


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_an_empty_answer_is_refused(answer: str) -> None:
    assert "empty answer" in refusal(BUILT["gpt2"], answer=answer)


def test_an_answer_that_the_tokenizer_cannot_spell_is_refused() -> None:
    tokenizer = wrap(Tokenizer(models.BPE(vocab={"q": 0, "</s>": 1}, merges=[])), eos_token="</s>")
    assert "'z'" in refusal(tokenizer, answer="z")
