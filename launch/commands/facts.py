"""`flearn facts inspect`: what is in a file of facts."""

from __future__ import annotations

import argparse
import json

from pipeline.facts.inspection import inspect, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("inspect", help="format, counts, conflicts and bad rows of a file of facts")
    action.add_argument("path", help="a JSON or JSON lines file, or a hub data set id")
    action.add_argument("--format", default="auto", help="the schema's name; auto: detect it (default)")
    action.add_argument("--json", action="store_true", help="print a JSON object")
    action.set_defaults(handler=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect(arguments.path, arguments.format)
    print(json.dumps(found, ensure_ascii=False, indent=2) if arguments.json else render(found))
    return 0
