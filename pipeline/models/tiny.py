"""A tiny, randomly initialised model with a tokenizer of its own, made on the spot from a list of texts.

Its special tokens and ties are those of the big model of its kind. Llama 2 opens with a BOS, has no pad token
and an output head of its own. GPT-2 has one token for everything, Conv1D weights and tied embeddings. BLOOM
has a pad token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from pipeline.artifact import write_folder
from pipeline.config import TinyModel
from pipeline.errors import InputError
from pipeline.facts.fact import Fact

_MAX_POSITIONS = 1024


class _Specials(NamedTuple):
    """A family's special tokens."""

    unk: str
    bos: str
    eos: str
    pad: str | None
    adds_bos: bool
    """Whether its tokenizer puts BOS before every text by itself."""


_SPECIALS = {
    "llama": _Specials("<unk>", "<s>", "</s>", None, True),
    "gpt2": _Specials("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", None, False),
    "bloom": _Specials("<unk>", "<s>", "</s>", "<pad>", False),
}


def fact_texts(facts: Iterable[Fact]) -> Iterator[str]:
    """Every text in `facts` that a model may be asked or should answer.

    Answers follow a blank, as they do after a question: the tokenizer learns them so.
    """
    for fact in facts:
        yield from [fact.prompt, *fact.rephrasings]
        yield from (f" {answer}" for answer in [*fact.old_answers, fact.new_answer])
        for probe in [*fact.locality, *fact.portability]:
            yield probe.prompt
            yield from (f" {answer}" for answer in probe.answers)


def write_tiny_model(folder: Path, settings: TinyModel, texts: Iterable[str], seed: int) -> None:
    """Write a Hugging Face folder: config, fp32 safetensors and tokenizer.

    The same arguments give the same bytes. Raises InputError if the heads do not divide the hidden size.
    """
    _check(settings)
    with write_folder(folder) as aside:
        tokenizer = _train_tokenizer(settings, texts)
        tokenizer.save_pretrained(aside)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = tiny_config(settings, len(tokenizer), **_token_ids(tokenizer))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(aside)


def _check(settings: TinyModel) -> None:
    # Llama's rotary embedding turns a head's numbers in pairs.
    head_size, rest = divmod(settings.hidden_size, settings.num_heads)
    if rest or (settings.architecture == "llama" and head_size % 2):
        raise InputError(
            f"model.tiny: {settings.num_heads} heads do not divide hidden_size {settings.hidden_size}"
            " (for llama into even parts); change model.tiny.hidden_size or model.tiny.num_heads"
        )


def _train_tokenizer(settings: TinyModel, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which can spell any text: no token is ever unknown."""
    specials = _SPECIALS[settings.architecture]
    named = {"unk_token": specials.unk, "bos_token": specials.bos, "eos_token": specials.eos}
    if specials.pad is not None:
        named["pad_token"] = specials.pad
    tokens = list(dict.fromkeys(named.values()))  # GPT-2's are all the same one
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # any order would give other token ids
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if specials.adds_bos:
        pairs = [(specials.bos, tokenizer.token_to_id(specials.bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{specials.bos} $A", pair=f"{specials.bos} $A {specials.bos} $B", special_tokens=pairs
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        **named,
    )


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ["bos_token_id", "eos_token_id"] + (["pad_token_id"] if tokenizer.pad_token is not None else [])
    return {name: getattr(tokenizer, name) for name in names}


def tiny_config(settings: TinyModel, num_tokens: int, **token_ids: int) -> PretrainedConfig:
    """The model's config, for a vocabulary of `num_tokens`."""
    sizes = _SIZES[settings.architecture](settings)
    return AutoConfig.for_model(settings.architecture, vocab_size=num_tokens, **token_ids, **sizes)


def _llama(settings: TinyModel) -> dict[str, Any]:
    num_eights = -(-settings.hidden_size * 8 // 24)  # 8/3 of the hidden size, as in Llama, in steps of 8
    return {
        "hidden_size": settings.hidden_size,
        "intermediate_size": num_eights * 8,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_heads,
        "max_position_embeddings": _MAX_POSITIONS,
        "tie_word_embeddings": False,
    }


def _gpt2(settings: TinyModel) -> dict[str, Any]:
    # GPT-2's own dropout of 0.1 would make a loss depend on how a batch is cut into micro-batches.
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {
        "n_embd": settings.hidden_size,
        "n_layer": settings.num_layers,
        "n_head": settings.num_heads,
        "n_positions": _MAX_POSITIONS,
        **dropout,
    }


def _bloom(settings: TinyModel) -> dict[str, Any]:
    return {"hidden_size": settings.hidden_size, "n_layer": settings.num_layers, "n_head": settings.num_heads}


_SIZES = {"llama": _llama, "gpt2": _gpt2, "bloom": _bloom}
