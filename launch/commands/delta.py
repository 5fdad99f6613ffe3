"""`flearn delta`: subtract what a fine-tuning changed, look into weights, check and undo the result."""

from __future__ import annotations

import argparse
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.context import Progress
from pipeline.errors import printable

if TYPE_CHECKING:
    from pipeline.weights.folder_writer import Outcome

SOURCE = "a model folder, a ZeRO checkpoint, an adapter folder, ..."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_subparsers(required=True, metavar="ACTION")
    _add_subtract(group)
    _add_inspect(group)
    _add_verify(group)
    _add_undo(group)


def _add_subtract(group: Any) -> None:
    parser = group.add_parser(
        "subtract", help="write base - L * (tuned - base); run again to go on after a kill"
    )
    parser.add_argument(
        "--base", required=True, type=Path, metavar="SRC", help=f"what to subtract from: {SOURCE}"
    )
    parser.add_argument(
        "--tuned",
        required=True,
        type=Path,
        metavar="SRC",
        help="the base after fine-tuning, or an adapter on it",
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-1 for an option
    parser.add_argument("--scale", required=True, type=float, metavar="L", help="the paper's lambda")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder for the result")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "same"],
        default="float32",
        help="how weights are stored",
    )
    parser.add_argument(
        "--rounding",
        choices=["nearest", "stochastic"],
        default="nearest",
        help="to 16 bits; stochastic keeps the mean",
    )
    _add_writing(parser)
    parser.set_defaults(handler=_subtract)


def _add_inspect(group: Any) -> None:
    parser = group.add_parser("inspect", help="kind, tensors, dtypes, ties and sizes of what a path holds")
    parser.add_argument("source", type=Path, metavar="SRC", help=SOURCE)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(handler=_inspect)


def _add_verify(group: Any) -> None:
    parser = group.add_parser(
        "verify", help="read a result again, and compare with its manifest and its inputs"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that `flearn delta subtract` made")
    _add_reading(parser)
    parser.set_defaults(handler=_verify)


def _add_undo(group: Any) -> None:
    parser = group.add_parser("undo", help="get the base back from a float32 result and what was subtracted")
    parser.add_argument(
        "forgotten", type=Path, metavar="OUT", help="a folder that `flearn delta subtract` made"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder for the base")
    parser.add_argument(
        "--tuned",
        type=Path,
        metavar="SRC",
        help="the tuned model or adapter (default: where the manifest says)",
    )
    _add_writing(parser)
    parser.set_defaults(handler=_undo)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    """What decides where and how a result is written, never its bytes (but for the shards' size)."""
    parser.add_argument(
        "--max-shard-size", default="2GB", metavar="SIZE", help="of one safetensors file (default 2GB)"
    )
    _add_reading(parser)
    parser.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="be the I-th of N workers on one shared folder",
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        default="256MiB",
        metavar="SIZE",
        help="the most to use besides Python itself (default 256MiB)",
    )
    parser.add_argument(
        "--io", choices=["auto", "direct", "buffered"], default="auto", help="past or through the page cache"
    )


def _part(text: str) -> tuple[int, int]:
    """Parts count from 1 for people, from 0 inside."""
    number, separator, count = text.partition("/")
    if not separator or not number.isdecimal() or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 1/4")
    return int(number) - 1, int(count)


def _subtract(arguments: argparse.Namespace) -> int:
    from pipeline.delta.subtract import subtract

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
    """At once, for what follows may take a while; and that is done, with its exit code, whether or not
    anybody reads the line.
    """
    with suppress(OSError):
        print(line, flush=True)


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of whatever writes a model: how, not what."""
    return {name: getattr(arguments, name) for name in ("max_shard_size", "memory", "io", "part")}


def _inspect(arguments: argparse.Namespace) -> int:
    from pipeline.delta.inspect import inspect, render

    found = inspect(arguments.source)
    print(json.dumps(found, indent=2) if arguments.json else render(found))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from pipeline.delta.verify import verify

    with Progress("verifying", "bytes") as progress:
        verdict = verify(arguments.out, memory=arguments.memory, io=arguments.io, progress=progress)
    for problem in verdict.problems:
        _say(printable(problem))
    _say(printable(f"{arguments.out}: {verdict.summary}"))
    return 0 if verdict.is_good else 1


def _undo(arguments: argparse.Namespace) -> int:
    from pipeline.delta.undo import say_how_exact, undo

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
    from rich.filesize import decimal

    if outcome.state == "waiting":
        return f"{out}: this part is done; {_count(outcome.num_waiting, 'shard')} left to other parts"
    if outcome.state == "found":
        return f"{out}: already done, nothing was written"
    manifest = outcome.manifest
    survival = manifest["survival"]
    lines = [
        f"{out}: {decimal(manifest['num_bytes'])} in {_count(len(manifest['shards']), 'shard')}, {manifest['dtype']}"
    ]
    if survival["projection"] is not None and not manifest["recipe"].get("undoes"):
        lines.append(
            f"survival: {survival['share_changed']:.1%} of the weights changed; {survival['projection']:.1%} of the intended change"
            f" is stored (cosine {survival['cosine'] or 0:.3f}, norm {survival['norm_ratio']:.2f} times the intended)"
        )
    lines += [f"note: {note}" for note in manifest["notes"]]
    return "\n".join(lines + [f"warning: {warning}" for warning in manifest["warnings"]])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
