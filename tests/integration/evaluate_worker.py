"""One rank of an evaluation: `evaluate_worker.py FOLDER OUT`, with RANK, WORLD_SIZE and MEETING set.

MEETING is a file, not there yet, by which the ranks find each other: a free port may be taken by another
process. FOLDER holds the artifacts `model` and `facts`. Exit 0: done; 3: asked to stop. Rank 0 writes
OUT/result.json."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

from pipeline.artifact import Artifact, write_json
from pipeline.config import Evaluate, Prompt
from pipeline.context import Context, Preempted
from pipeline.evaluate.stage import run


def main(folder: Path, out: Path) -> int:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", f"file://{os.environ['MEETING']}", rank=rank, world_size=world_size)
    context = Context(dist.get_rank(), dist.get_world_size(), group=dist.new_group(backend="gloo"))
    context.listen()
    section = {
        "evaluate": Evaluate(batch_size=1, max_new_tokens=8).model_dump(),
        "prompt": Prompt().model_dump(),
    }
    try:
        result = run(section, {role: Artifact(folder / role) for role in ("model", "facts")}, out, context)
    except Preempted:
        return 3
    if context.is_main:
        write_json(out / "result.json", result)
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(code)
