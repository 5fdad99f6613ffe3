"""Subtracting a LoRA adapter of a high rank on one large weight: time and peak memory, as one JSON line.

    python tests/bench/adapter.py       # as of an lm_head of Qwen's vocabulary
    python tests/bench/adapter.py --out-features 4096 --in-features 4096 --rank 16

What importing torch takes stands beside it, for the products are torch's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from subtract import run_command, timed, watch

from pipeline.artifact import write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out-features", type=int, default=152064)
    parser.add_argument("--in-features", type=int, default=256)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--conv1d", action="store_true", help="the weight lies as in x out, as GPT-2's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-adapter-", dir=arguments.folder) as folder:
        print(json.dumps(measure(Path(folder), arguments)))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    base, adapter = folder / "base", folder / "adapter"
    write_base_and_adapter(base, adapter, arguments)
    options = {"dtype": arguments.dtype, "memory": arguments.memory}
    _, bare = timed(lambda: watch([sys.executable, "-c", "import torch"]))
    seconds, peak = timed(lambda: run_command(base, adapter, folder / "out", options))
    return {"command_seconds": seconds, "command_peak_mib": peak, "import_torch_peak_mib": bare}


def write_base_and_adapter(base: Path, adapter: Path, arguments: argparse.Namespace) -> None:
    """A bf16 base of one weight, and an adapter on it with float32 factors, as PEFT saves them."""
    base.mkdir()
    adapter.mkdir()
    torch.manual_seed(0)
    weight = torch.randn(arguments.out_features, arguments.in_features).bfloat16()
    save_file(
        {"lm_head.weight": weight.T.contiguous() if arguments.conv1d else weight}, base / "model.safetensors"
    )
    a, b = (
        torch.randn(arguments.rank, arguments.in_features),
        torch.randn(arguments.out_features, arguments.rank),
    )
    factors = {
        f"base_model.model.lm_head.lora_{factor}.weight": values for factor, values in (("A", a), ("B", b))
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": arguments.rank,
        "lora_alpha": arguments.rank,
        "fan_in_fan_out": arguments.conv1d,
    }
    write_json(adapter / "adapter_config.json", config)


if __name__ == "__main__":
    main()
