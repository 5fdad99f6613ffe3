"""theta' straight from a ZeRO checkpoint, against consolidating it first: time and peak memory as JSON.

    python tests/bench/zero.py                                  # a small model, ZeRO-2 of 2 ranks
    python tests/bench/zero.py --layers 8 --stage 3 --ranks 8
    python tests/bench/zero.py --mergekit DIR                   # also mergekit-yaml of the bin folder DIR

What others need: DeepSpeed's zero_to_fp32 writes the consolidated model, then a merge tool reads it again.
The checkpoint is laid out as DeepSpeed's (tests/integration checks that), without its optimizer's moments.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from subtract import require_mergekit, run_command, run_mergekit, timed, watch, write_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from zero_checkpoint import Checkpoint

GROUP_ELEMENTS = 1 << 28

CONSOLIDATE = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
convert_zero_checkpoint_to_fp32_state_dict(sys.argv[1], sys.argv[2], safe_serialization=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=1, help="of a Llama of width 2048 (22 make 1.1B weights)"
    )
    parser.add_argument("--stage", type=int, default=2, choices=[1, 2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only-ours", action="store_true", help="leave out zero_to_fp32")
    parser.add_argument("--mergekit", type=Path, metavar="DIR", help="a folder that has mergekit-yaml")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    arguments = parser.parse_args()
    if arguments.mergekit is not None:
        require_mergekit(arguments.mergekit)
    with tempfile.TemporaryDirectory(prefix="bench-zero-", dir=arguments.folder) as folder:
        print(json.dumps(measure(Path(folder), arguments)))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Each way as processes of its own, one after the other, their imports included.

    Their inputs lie in the page cache as far as that has room, as a fine-tuning leaves them.
    """
    base, checkpoint, out = folder / "base", folder / "checkpoint", folder / "out"
    write_model(base, arguments.layers, 0)
    num_weights = write_checkpoint(base, checkpoint, arguments.stage, arguments.ranks)
    result: dict[str, object] = {"weights": num_weights, "stage": arguments.stage, "ranks": arguments.ranks}
    _, bare = timed(lambda: watch([sys.executable, "-c", "import torch"]))
    seconds, peak = timed(lambda: run_command(base, checkpoint, out, {"dtype": "bfloat16"}))
    result |= {"import_torch_peak_mib": bare, "subtract_seconds": seconds, "subtract_peak_mib": peak}
    if arguments.only_ours:
        return result
    shutil.rmtree(out)
    consolidated = folder / "consolidated"
    seconds, peak = timed(lambda: watch([sys.executable, "-c", CONSOLIDATE, checkpoint, consolidated]))
    result |= {"zero_to_fp32_seconds": seconds, "zero_to_fp32_peak_mib": peak}
    if arguments.mergekit is not None:
        shutil.copy(base / "config.json", consolidated)  # zero_to_fp32 writes nothing but weights
        seconds, peak = timed(lambda: run_mergekit(base, consolidated, out, arguments.mergekit))
        result |= {"mergekit_seconds": seconds, "mergekit_peak_mib": peak}
    return result


def write_checkpoint(base: Path, folder: Path, stage: int, num_ranks: int) -> int:
    """A ZeRO checkpoint of the base after a small change, in groups of about a gigabyte.

    Returns the number of its weights.
    """
    with safe_open(base / "model.safetensors", "pt") as weights:
        sizes = {name: prod(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 (no mapping)
        groups: list[list[str]] = [[]]
        for name, size in sizes.items():
            if sum(sizes[member] for member in groups[-1]) + size > GROUP_ELEMENTS and groups[-1]:
                groups.append([])
            groups[-1].append(name)
        tuned = [Tuned(weights, names) for names in groups]
        Checkpoint(stage, num_ranks, tuned, has_moments=False).write(folder)
    return sum(sizes.values())


class Tuned(Mapping[str, torch.Tensor]):
    """Some of the base's tensors, a little changed, in fp32.

    Each is made when it is asked for, so that billions of weights take no memory.
    """

    def __init__(self, weights: Any, names: list[str]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, name: str) -> torch.Tensor:
        values: torch.Tensor = self._weights.get_tensor(name).float()
        return values.mul_(1.003)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


if __name__ == "__main__":
    main()
