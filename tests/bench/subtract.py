"""How fast subtraction runs, against moving the same bytes by the same I/O without arithmetic: one JSON line.

    python tests/bench/subtract.py                  # a small model
    python tests/bench/subtract.py --layers 22      # 1.1B weights: 2 x 2.2 GB read, 2.2 GB written
    python tests/bench/subtract.py --mergekit DIR   # also mergekit-yaml; DIR is its environment's bin folder

The ways take turns, and their medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from pipeline.artifact import write_json
from pipeline.delta.subtract import subtract
from pipeline.weights.floats import of_tensor
from pipeline.weights.io.direct import InputFile, Io, is_cached, page_memory
from pipeline.weights.io.pread import PreadFile
from pipeline.weights.io.staged import StagedFile
from pipeline.weights.shard import header_bytes
from pipeline.weights.source import TensorInfo
from pipeline.weights.stream import CHUNK_BYTES, MAX_THREADS

HIDDEN, INNER, KEYS, VOCABULARY = 2048, 5632, 256, 32000


def main() -> None:
    arguments = _parse()
    if arguments.mergekit is not None:
        require_mergekit(arguments.mergekit)
    with tempfile.TemporaryDirectory(prefix="bench-subtract-", dir=arguments.folder) as folder:
        print(json.dumps(measure(Path(folder), arguments)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=2, help="of a Llama of width 2048 (22 make 1.1B weights)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="0: only the command, and mergekit where it is given, once"
    )
    parser.add_argument(
        "--inputs",
        default="cold",
        choices=["cold", "cached"],
        help="where both models are: on disk, or in the page cache",
    )
    parser.add_argument("--dtype", default="same")
    parser.add_argument("--rounding", default="nearest")
    parser.add_argument("--io", default="auto", choices=["auto", "direct", "buffered"])
    parser.add_argument("--mergekit", type=Path, metavar="DIR", help="a folder that has mergekit-yaml")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
    return parser.parse_args()


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Alternate all ways, each round beginning with another, and compare medians."""
    base, tuned, out = folder / "base", folder / "tuned", folder / "out"
    for seed, path in enumerate((base, tuned)):
        write_model(path, arguments.layers, seed)
    options = {"dtype": arguments.dtype, "rounding": arguments.rounding, "io": arguments.io}
    ways: dict[str, Callable[[], object]] = {"command": lambda: run_command(base, tuned, out, options)}
    if arguments.rounds:
        ways["move"] = lambda: move(base, tuned, out, arguments.io)
        ways["subtract"] = lambda: subtract(base, tuned, 0.3, out, **options)
    if arguments.mergekit is not None:
        ways["mergekit"] = lambda: run_mergekit(base, tuned, out, arguments.mergekit)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {"import_torch": watch([sys.executable, "-c", "import torch"])}
    for i in range(max(arguments.rounds, 1)):
        first = i % len(ways)  # a disk may be faster for a while after a rest
        for name in [*ways][first:] + [*ways][:first]:
            shutil.rmtree(out, ignore_errors=True)
            settle([base, tuned], arguments.inputs)
            started = time.perf_counter()
            peak = ways[name]()
            seconds[name].append(time.perf_counter() - started)
            if isinstance(peak, int):
                peaks[name] = max(peak, peaks.get(name, 0))
    gigabytes = 3 * (base / "model.safetensors").stat().st_size / 1e9
    result: dict[str, object] = {
        "gigabytes_moved": round(gigabytes, 2),
        "inputs": arguments.inputs,
        **options,
    }
    result |= {
        f"{name}_seconds": [round(taken, 2) for taken in all_taken] for name, all_taken in seconds.items()
    }
    result |= {f"{name}_peak_mib": peak >> 20 for name, peak in peaks.items()}
    medians = {name: statistics.median(all_taken) for name, all_taken in seconds.items()}
    if "move" in medians:
        result["ratio_to_moving"] = round(medians["subtract"] / medians["move"], 3)
    if "mergekit" in medians:
        result["mergekit_to_command"] = round(medians["mergekit"] / medians["command"], 2)
    return result


def settle(models: list[Path], inputs: str) -> None:
    """Let the disk finish what it has to do, and have the models in the page cache, or not."""
    os.sync()
    buffer = bytearray(CHUNK_BYTES)
    for model in models:
        with (model / "model.safetensors").open("rb", buffering=0) as file:
            if inputs == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.readinto(buffer):
                    pass
            if is_cached(file.fileno(), 0, os.fstat(file.fileno()).st_size) != (inputs == "cached"):
                sys.exit(f"{file.name}: cannot be had {inputs} here; try another --folder")


def write_model(folder: Path, num_layers: int, seed: int) -> None:
    """A bf16 model of random weights; the tuned one (seed 1) differs a little from the base (seed 0)."""
    folder.mkdir()
    infos = [TensorInfo(name, shape, "bfloat16") for name, shape in _shapes(num_layers)]
    with (folder / "model.safetensors").open("wb") as file:  # tensor by tensor: all at once may be gigabytes
        file.write(header_bytes(infos))
        for i, info in enumerate(infos):
            generator = torch.Generator().manual_seed(i)
            values = torch.randn(info.num_elements, generator=generator) * 0.02
            if seed:
                values += torch.randn(info.num_elements, generator=generator) * 2e-4
            file.write(of_tensor(values.bfloat16()).data)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
    }
    heads = {
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": num_layers,
        "vocab_size": VOCABULARY,
    }
    write_json(folder / "config.json", config | heads | {"torch_dtype": "bfloat16"})


def _shapes(num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        for name, size in (("q", HIDDEN), ("k", KEYS), ("v", KEYS), ("o", HIDDEN)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (size, HIDDEN)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.mlp.gate_proj.weight", (INNER, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", (INNER, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, INNER)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def move(base: Path, tuned: Path, out: Path, io: Io) -> None:
    """Read both models and write one, in the same chunks on as many threads."""
    out.mkdir()
    paths = [folder / "model.safetensors" for folder in (base, tuned)]
    sources = [InputFile(PreadFile(path), io, may_use_cache=True) for path in paths]
    num_bytes = (base / "model.safetensors").stat().st_size
    offsets = iter(range(0, num_bytes, CHUNK_BYTES))
    lock = threading.Lock()

    def work(target: StagedFile) -> None:
        areas = [page_memory(CHUNK_BYTES) for _ in sources]
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            count = min(CHUNK_BYTES, num_bytes - offset)
            for source, area in zip(sources, areas, strict=True):
                if source.is_direct:
                    source.read_pages(area, offset, count)
                else:
                    source.read(area[:count], offset)
            target.write_pages(areas[0], count, offset)

    with StagedFile(out / "model.safetensors", num_bytes, io) as target:
        threads = [threading.Thread(target=work, args=(target,)) for _ in range(MAX_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for source in sources:
        source.close()


def run_command(base: Path, tuned: Path, out: Path, options: Mapping[str, str]) -> int:
    """`flearn delta subtract` as a process; its peak of anonymous memory in bytes."""
    command = [
        sys.executable,
        "-m",
        "launch",
        "delta",
        "subtract",
        "--base",
        base,
        "--tuned",
        tuned,
        "--scale",
        "0.3",
        "--out",
        out,
    ]
    return watch([*command, *(word for name, value in options.items() for word in (f"--{name}", value))])


def require_mergekit(folder: Path) -> None:
    if not (folder / "mergekit-yaml").is_file():
        sys.exit(f"{folder / 'mergekit-yaml'}: is not there")


def run_mergekit(base: Path, tuned: Path, out: Path, folder: Path) -> int:
    """The same subtraction by mergekit's task arithmetic; its peak of anonymous memory in bytes."""
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"weight": -0.3}}],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    write_json(out.with_suffix(".yaml"), config)  # JSON is YAML, too
    return watch(
        [folder / "mergekit-yaml", out.with_suffix(".yaml"), out, "--lazy-unpickle", "--no-copy-tokenizer"]
    )


def watch(command: list[object]) -> int:
    """Run a command to its end; its highest anonymous memory in bytes, sampled from /proc."""
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0, command
    return peak


def timed(way: Callable[[], int]) -> tuple[float, int]:
    """Seconds and MiB of something that returns its peak in bytes; it begins when the disk is idle."""
    os.sync()
    started = time.perf_counter()
    peak = way()
    return round(time.perf_counter() - started, 2), peak >> 20


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:")), 0
    )


if __name__ == "__main__":
    main()
