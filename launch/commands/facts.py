"""`flearn facts inspect`: what is in a file of facts."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `facts` to the command line."""
    group = commands.add_parser("facts", help="look at files of facts").add_subparsers(
        required=True, metavar="ACTION"
    )
    inspect = group.add_parser("inspect", help="format, counts, conflicts and bad rows of a file of facts")
    inspect.add_argument("path", help="a JSON or JSON lines file, or a hub data set id")
    inspect.add_argument("--format", default="auto", help="the schema's name; auto: detect it (default)")
    inspect.add_argument("--json", action="store_true", help="print a JSON object")
    inspect.set_defaults(handler=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from pipeline.facts.inspection import inspect, render

    found = inspect(arguments.path, arguments.format)
    print(json.dumps(found, ensure_ascii=False, indent=2) if arguments.json else render(found))
    return 0
