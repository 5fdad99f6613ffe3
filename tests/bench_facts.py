"""The facts that benchmarks run on: a data file where one is named (real ZsRE, say), else the project's
own.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from pipeline.facts.fact import Fact
from pipeline.facts.read import read

OWN = Path(__file__).parents[1] / "configs/facts/world_updates.jsonl"
VARIABLE = "FLEARN_BENCH_FACTS"


def add_argument(parser: argparse.ArgumentParser) -> None:
    """`--facts FILE`, of any format that `facts.path` takes; by default what the environment names, else our
    own facts.
    """
    default = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else OWN
    parser.add_argument(
        "--facts",
        type=Path,
        default=default,
        help=f"data file (default: ${VARIABLE}, else world_updates.jsonl)",
    )


def load(path: Path, limit: int) -> list[Fact]:
    """The first `limit` facts of `path` that have a new answer."""
    return [fact for fact in read(str(path)).facts if fact.new_answer][:limit]


def repeated(facts: list[Fact], number: int) -> list[Fact]:
    """`number` facts: those given, again and again if they are fewer."""
    return [replace(fact, id=f"{i}") for i, fact in enumerate(islice(cycle(facts), number))]
