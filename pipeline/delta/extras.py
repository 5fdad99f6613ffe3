"""Extras: the config and the tokenizer that go with a base's weights, be it a folder or a single file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from blake3 import blake3

from pipeline.weights.digest import content_digest
from pipeline.weights.writer import find_extras

CONFIG = "config.json"


def extras_folder(base: Path) -> Path | None:
    """Where the extras of `base` lie: in itself; a single file's beside it, if that is a model's folder.
    None: nowhere.

    Raises InputError if something there may not be copied, or the config is damaged.
    """
    folder = base if base.is_dir() else base.parent
    if folder != base and not (base.is_file() and _is_model_config(folder / CONFIG)):
        return None
    find_extras(folder)
    return folder


def _is_model_config(path: Path) -> bool:
    """Whether a file is a model's config: other programs have a `config.json`, too, and what lies beside
    theirs is none of ours.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


def extras_recipe(base: Path, folder: Path | None) -> dict[str, Any]:
    """The recipe's field for what is copied from the `folder` beside a single file. (A base that is a folder
    has it in its own digest.)
    """
    if folder is None or folder == base:
        return {}
    digests = [(str(path.relative_to(folder)), content_digest(path)) for path in find_extras(folder)]
    return {
        "extras": {
            "path": str(folder.absolute()),
            "digest": hashlib.sha256(repr(digests).encode()).hexdigest()[:16],
        }
    }


def extras_warnings(base: Path, folder: Path | None) -> list[str]:
    """What the caller should know of a result without a config."""
    if folder is not None and (folder / CONFIG).is_file():
        return []
    return [
        f"the result has no config.json, for {base} has none: from_pretrained needs the model's config and tokenizer beside the weights"
    ]


def extras_digests(folder: Path | None, copied_to: Path) -> dict[str, str]:
    """{file: blake3 of its bytes} of the copies of the extras in `folder`. Raises FileNotFoundError if one is
    not there.
    """
    names = [str(path.relative_to(folder)) for path in find_extras(folder)] if folder is not None else []
    return {name: file_digest(copied_to / name) for name in names}


def file_digest(path: Path) -> str:
    """blake3 of a file's bytes."""
    return blake3(path.read_bytes()).hexdigest()
