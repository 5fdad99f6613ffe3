"""Our training loop against a plain one, on 512 records and 2 layers of SmolLM2's size: prints one JSON line.

    python tests/bench/train.py
    python tests/bench/train.py --facts zsre_mend_3000.json --limit 512 --batch-size 64 --micro-batch-size 16
    python tests/bench/train.py --precision fp32

Ours is the loop that `flearn run` calls, with its step log: batches of like length, logits at the answers
alone, ZeRO-2. Plain is what one writes first: padded batches in file order, transformers' loss over all
logits. Both use torch's fused AdamW, one process and the same threads. They take turns of a step, since other
work may share the machine. Tokens are real ones: prompt, answer and EOS, no padding. Memory is how far a
turn's peak rises above what was resident before it: the activations, for weights and optimizer stay. What a
checkpoint costs (the plain loop saves none) stands beside it.

Without real ZsRE (`--facts`, or $FLEARN_BENCH_FACTS) the records are world_updates.jsonl, repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.config import Prompt, TinyModel
from pipeline.context import Context, peak_memory_bytes, reset_peak_memory
from pipeline.facts.fact import Fact
from pipeline.facts.prompts import Prompter
from pipeline.models.packaged import PACKAGED
from pipeline.models.targets import TargetLogits
from pipeline.models.tiny import fact_texts, write_tiny_model
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.course import Course, Record, training_records
from pipeline.train.deepspeed_config import make_ready
from pipeline.train.loop import train
from pipeline.train.model import DTYPES
from pipeline.train.step_log import StepLog
from pipeline.train.zero_engine import ZeroEngine, process_state
from pipeline.training_config import FullTraining, Training

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_facts


@dataclass
class Side:
    """One of the two loops: what its turns took."""

    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    rates: list[float] = field(default_factory=list)
    _begun: tuple[int, float, float] = (0, 0.0, 0.0)

    def forget(self) -> None:
        """Begin to count anew."""
        self.tokens, self.seconds, self.cpu_seconds, self.memory_bytes, self.rates = 0, 0.0, 0.0, 0, []

    def begin(self) -> None:
        reset_peak_memory("cpu")
        self._begun = resident_bytes(), time.perf_counter(), time.process_time()

    def end(self, tokens: int) -> None:
        """A turn of `tokens` has ended."""
        resident, started, cpu_started = self._begun
        seconds = time.perf_counter() - started
        self.tokens += tokens
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu_started
        self.rates.append(tokens / seconds)
        self.memory_bytes = max(self.memory_bytes, peak_memory_bytes() - resident)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def cpu_rate(side: Side) -> float:
    """Tokens per second of processor time: what other work on the machine hardly changes."""
    return side.tokens / side.cpu_seconds


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load_tokenizer(facts: list[Fact], folder: Path) -> tuple[str, Any]:
    """SmolLM2's, if its package is installed, else one trained on the facts."""
    packaged = PACKAGED["smollm2-135m"]
    spec = importlib.util.find_spec(packaged.module)
    if spec is not None and spec.submodule_search_locations:
        return packaged.package, AutoTokenizer.from_pretrained(
            spec.submodule_search_locations[0], gguf_file=packaged.file
        )
    write_tiny_model(folder / "tokenizer", TinyModel(vocab_size=8192), fact_texts(facts), seed=0)
    return "trained on the facts", AutoTokenizer.from_pretrained(folder / "tokenizer")


def make_model(precision: str) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
    }
    config = LlamaConfig(
        vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False, **shape
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(DTYPES[precision]).train()


def plain(model: Any, records: list[Record], training: Training) -> Iterator[int]:
    """The same number of records a step and a pass, as they come."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True
    )
    for start in range(0, len(records), training.batch_size):
        batch = records[start : start + training.batch_size]
        micro_batches = [
            batch[i : i + training.micro_batch_size] for i in range(0, len(batch), training.micro_batch_size)
        ]
        for rows in micro_batches:
            loss = model(**padded(rows)).loss / len(micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield sum(record.num_tokens for record in batch)


def padded(records: list[Record]) -> dict[str, torch.Tensor]:
    """A batch as transformers takes it: labels of -100 everywhere but at the answers."""
    width = max(record.num_tokens for record in records)
    input_ids, labels = (
        torch.zeros(len(records), width, dtype=torch.int64),
        torch.full((len(records), width), -100),
    )
    attention_mask = torch.zeros_like(input_ids)
    for i, record in enumerate(records):
        ids, start = torch.tensor(record.encoded.ids), record.encoded.answer_start
        input_ids[i, : len(ids)] = ids
        labels[i, start : len(ids)] = ids[start:]
        attention_mask[i, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def measure(records: list[Record], training: Training, folder: Path) -> dict[str, Any]:
    course = Course(records, training, seed=0, num_ranks=1)
    ready = make_ready(training, num_ranks=1, hidden_size=576)
    model, context = make_model(training.precision), Context()
    ours, other, other_steps = Side(), Side(), plain(make_model(training.precision), records, training)

    def turn(done: int) -> None:
        """Our loop calls this after every step, where it would save: the other one's turn."""
        ours.end(sum(records[i].num_tokens for i in course.batches.at(done - 1)))
        other.begin()
        other.end(next(other_steps))
        if done == 1:  # the first steps also make the optimizers' moments
            for side in (ours, other):
                side.forget()
        ours.begin()

    with process_state(ready), TargetLogits(model) as picked, closing(ZeroEngine(model, ready)) as engine:
        with StepLog(folder / "steps.jsonl") as log:
            log.open(0)
            ours.begin()
            train(engine, picked, course, 0, turn, log, context)
        started = time.perf_counter()
        Checkpoints(folder / "checkpoints", context).save(engine, course.num_steps)
        checkpoint_seconds = time.perf_counter() - started
    sides = {"ours": ours, "plain": other}
    return {
        "num_records": len(records),
        "batch_size": training.batch_size,
        "micro_batch_size": training.micro_batch_size,
        "precision": training.precision,
        "threads": torch.get_num_threads(),
        "num_targets": sum(record.num_targets for record in records),
        "num_tokens": sum(course.batches.lengths),
        **{f"{name}_tokens_per_second": round(side.rate, 1) for name, side in sides.items()},
        **{f"{name}_rise_mib": side.memory_bytes >> 20 for name, side in sides.items()},
        "speedup": round(ours.rate / other.rate, 2),
        "cpu_speedup": round(cpu_rate(ours) / cpu_rate(other), 2),
        "speedup_by_turn": [round(a / b, 2) for a, b in zip(ours.rates, other.rates, strict=True)],
        "checkpoint_seconds": round(checkpoint_seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="our training loop against a plain one")
    bench_facts.add_argument(parser)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(name, value)
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    training = FullTraining(
        epochs=1,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        precision=options.precision,
        lr=1e-4,
        checkpoint_every_steps=1,  # our loop's call where it would save is where the turns change
    )
    facts = bench_facts.load(options.facts, options.limit)
    with tempfile.TemporaryDirectory() as folder:
        name, tokenizer = load_tokenizer(facts, Path(folder))
        repeated = bench_facts.repeated(facts, options.limit)
        records = training_records(repeated, "new", Prompter(tokenizer, Prompt()), training.max_length, None)
        described = {
            "bench": "train",
            "facts": options.facts.name,
            "num_different_facts": len(facts),
            "tokenizer": name,
        }
        print(json.dumps(described | measure(records, training, Path(folder))), flush=True)
    os._exit(0)  # DeepSpeed on a CPU sometimes aborts while the interpreter ends


if __name__ == "__main__":
    main()
