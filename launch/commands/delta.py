"""`flearn delta`: subtract what a fine-tuning changed, look into weights, check and undo the result."""

from __future__ import annotations

import argparse
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from pipeline.context import Progress
from pipeline.delta.inspect import inspect, render
from pipeline.delta.subtract import subtract
from pipeline.delta.undo import say_how_exact, undo
from pipeline.delta.verify import verify
from pipeline.errors import printable
from pipeline.weights.folder_writer import Outcome

SOURCE = "a model folder, a ZeRO checkpoint, an adapter folder, ..."
RESULT = "a folder that `flearn delta subtract` made"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    what = "write base - L * (tuned - base); run again to go on after a kill"
    _add_subtract(actions.add_parser("subtract", help=what))
    what = "kind, tensors, dtypes, ties and sizes of what a path holds"
    _add_inspect(actions.add_parser("inspect", help=what))
    what = "read a result again, and compare with its manifest and its inputs"
    _add_verify(actions.add_parser("verify", help=what))
    what = "get the base back from a float32 result and what was subtracted"
    _add_undo(actions.add_parser("undo", help=what))


def _add_subtract(parser: argparse.ArgumentParser) -> None:
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-1 for an option
    add = parser.add_argument
    add("--base", required=True, type=Path, metavar="SRC", help=f"what to subtract from: {SOURCE}")
    tuned = "the base after fine-tuning, or an adapter on it"
    add("--tuned", required=True, type=Path, metavar="SRC", help=tuned)
    add("--scale", required=True, type=float, metavar="L", help="the paper's lambda")
    add("--out", required=True, type=Path, metavar="DIR", help="a new folder for the result")
    dtypes = ["float32", "bfloat16", "float16", "same"]
    add("--dtype", choices=dtypes, default="float32", help="how weights are stored")
    rounding = "to 16 bits; stochastic keeps the mean"
    add("--rounding", choices=["nearest", "stochastic"], default="nearest", help=rounding)
    _add_writing(parser)
    parser.set_defaults(handler=_subtract)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help=SOURCE)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(handler=_inspect)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help=RESULT)
    _add_reading(parser)
    parser.set_defaults(handler=_verify)


def _add_undo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("forgotten", type=Path, metavar="OUT", help=RESULT)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder for the base")
    tuned = "the tuned model or adapter (default: where the manifest says)"
    parser.add_argument("--tuned", type=Path, metavar="SRC", help=tuned)
    _add_writing(parser)
    parser.set_defaults(handler=_undo)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    """What decides where and how a result is written, never its bytes (but for the shards' size)."""
    size = "of one safetensors file (default 2GB)"
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help=size)
    _add_reading(parser)
    part = "be the I-th of N workers on one shared folder"
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help=part)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    memory = "the most to use besides Python itself (default 256MiB)"
    parser.add_argument("--memory", default="256MiB", metavar="SIZE", help=memory)
    io = "past or through the page cache"
    parser.add_argument("--io", choices=["auto", "direct", "buffered"], default="auto", help=io)


def _part(text: str) -> tuple[int, int]:
    """(index, number of parts): counted from 1 on the command line, from 0 inside."""
    number, separator, count = text.partition("/")
    if not separator or not number.isdecimal() or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 1/4")
    return int(number) - 1, int(count)


def _subtract(arguments: argparse.Namespace) -> int:
    with Progress("subtracting", "bytes") as progress:
        outcome = subtract(
            arguments.base,
            arguments.tuned,
            arguments.scale,
            arguments.out,
            dtype=arguments.dtype,
            rounding=arguments.rounding,
            **_how(arguments),
            announce=_say,
            progress=progress,
        )
    print(_summary(outcome, arguments.out))
    return 0


def _say(line: str) -> None:
    """Print at once: what follows may take a while. Nobody has to read it: a closed output is no failure."""
    with suppress(OSError):
        print(line, flush=True)


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of whatever writes a model: how, not what."""
    return {name: getattr(arguments, name) for name in ("max_shard_size", "memory", "io", "part")}


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect(arguments.source)
    print(json.dumps(found, indent=2) if arguments.json else render(found))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with Progress("verifying", "bytes") as progress:
        verdict = verify(arguments.out, memory=arguments.memory, io=arguments.io, progress=progress)
    for problem in verdict.problems:
        _say(printable(problem))
    _say(printable(f"{arguments.out}: {verdict.summary}"))
    return 0 if verdict.is_good else 1


def _undo(arguments: argparse.Namespace) -> int:
    with Progress("undoing", "bytes") as progress:
        outcome = undo(
            arguments.forgotten,
            arguments.out,
            tuned=arguments.tuned,
            **_how(arguments),
            announce=_say,
            progress=progress,
        )
    print(_summary(outcome, arguments.out))
    if outcome.state != "waiting":
        print(say_how_exact(arguments.forgotten, arguments.out))
    return 0


def _summary(outcome: Outcome, out: Path) -> str:
    if outcome.state == "waiting":
        return f"{out}: this part is done; {_count(outcome.num_waiting, 'shard')} left to other parts"
    if outcome.state == "found":
        return f"{out}: already done, nothing was written"
    manifest = outcome.manifest
    shards = _count(len(manifest["shards"]), "shard")
    lines = [f"{out}: {decimal(manifest['num_bytes'])} in {shards}, {manifest['dtype']}"]
    survival = manifest["survival"]
    if survival["projection"] is not None and not manifest["recipe"].get("undoes"):
        lines.append(
            f"survival: {survival['share_changed']:.1%} of the weights changed;"
            f" {survival['projection']:.1%} of the intended change is stored"
            f" (cosine {survival['cosine'] or 0:.3f}, norm {survival['norm_ratio']:.2f} times the intended)"
        )
    lines += [f"note: {note}" for note in manifest["notes"]]
    lines += [f"warning: {warning}" for warning in manifest["warnings"]]
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
