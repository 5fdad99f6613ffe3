"""Extras: the config and the tokenizer that go with a base's weights, be it a folder or a single file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pipeline.weights.digest import content_digest
from pipeline.weights.writer import find_extras

CONFIG = "config.json"


def extras_folder(base: Path) -> Path | None:
    """Where the extras of `base` lie: in itself; a single file's beside it, if that is a model's folder, with a config. None: nowhere.

    Raises InputError if something there may not be copied, or the config is damaged.
    """
    folder = base if base.is_dir() else base.parent
    if folder != base and not (base.is_file() and os.path.lexists(folder / CONFIG)):
        return None
    find_extras(folder)
    return folder


def extras_recipe(base: Path) -> dict[str, Any]:
    """The recipe's field for what is copied from beside a single file. (A base that is a folder has it in its own digest.)"""
    folder = extras_folder(base)
    if folder is None or folder == base:
        return {}
    digests = [(str(path.relative_to(folder)), content_digest(path)) for path in find_extras(folder)]
    return {"extras": {"path": str(folder.absolute()), "digest": hashlib.sha256(repr(digests).encode()).hexdigest()[:16]}}


def extras_warnings(base: Path) -> list[str]:
    """What the caller should know of a result without a config."""
    folder = extras_folder(base)
    if folder is not None and (folder / CONFIG).is_file():
        return []
    return [
        f"the result has no config.json, for {base} has none: from_pretrained needs the model's config and tokenizer beside the weights"
    ]
