"""Tiny models: what is written loads as any Hugging Face folder does, and is the same every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import TinyModel
from pipeline.errors import InputError
from pipeline.facts.fact import Fact, Probe
from pipeline.models.tiny import fact_texts, write_tiny_model

ARCHITECTURES = ["llama", "gpt2", "bloom"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_and_runs(tiny_model: Callable[..., Path], architecture: str) -> None:
    folder = tiny_model(architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == architecture
    assert model.config.vocab_size == len(tokenizer) <= 512
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    ids = tokenizer("What is the capital?", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_text_survives_its_tokenizer(tiny_model: Callable[..., Path], architecture: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(architecture))
    text = "  Škoda's  naïve 北京\n\ttest , . 🙂"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokenizer.decode(encoded.input_ids) == text
    assert tokenizer.unk_token_id not in encoded.input_ids
    assert encoded.offset_mapping[0][0] == 0 and encoded.offset_mapping[-1][1] == len(text)


def test_special_tokens_are_those_of_the_family(tiny_model: Callable[..., Path]) -> None:
    llama, gpt2, bloom = (AutoTokenizer.from_pretrained(tiny_model(name)) for name in ARCHITECTURES)
    assert llama("Astana").input_ids[0] == llama.bos_token_id and llama.pad_token is None
    assert gpt2("Astana").input_ids[0] != gpt2.bos_token_id and gpt2.bos_token == gpt2.eos_token
    assert bloom("Astana").input_ids[0] != bloom.bos_token_id and bloom.pad_token == "<pad>"


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    settings = TinyModel(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)  # the caller's random state plays no part ...
        write_tiny_model(tmp_path / name, settings, ["some text", " more"], seed)
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "abc"]
    assert contents[0] == contents[1]
    assert contents[0]["model.safetensors"] != contents[2]["model.safetensors"]


def test_leaves_the_callers_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    write_tiny_model(
        tmp_path / "model", TinyModel(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300), ["text"], 1
    )
    assert torch.equal(torch.rand(1), expected)


def test_the_tokenizer_knows_the_answers(tmp_path: Path) -> None:
    fact = Fact(
        "1",
        "What is the capital?",
        "capital",
        ["Almaty"],
        "Astana",
        ["Name the capital."],
        [Probe("Who sang it?", ["Queen"])],
    )
    texts = list(fact_texts([fact] * 3))
    assert {" Almaty", " Astana", "Name the capital.", "Who sang it?", " Queen"} <= set(texts)
    write_tiny_model(
        tmp_path / "model", TinyModel(hidden_size=16, num_layers=1, num_heads=2, vocab_size=600), texts, 0
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer(" Almaty", add_special_tokens=False).input_ids) == 1


def test_heads_must_divide_the_hidden_size(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.tiny: 5 heads"):
        write_tiny_model(tmp_path / "model", TinyModel(hidden_size=16, num_heads=5), ["text"], 0)
    assert list(tmp_path.iterdir()) == []
