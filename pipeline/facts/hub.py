"""Records of a Hugging Face data set: a hub id `owner/name`, `owner/name:split`, or a folder that `datasets`
can load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import InputError


def load_records(name: str) -> list[dict[str, Any]]:
    """All records of one split (`train` where none is named), without the fields that are null.

    Raises InputError if there is no such data set, no network, or a choice of splits to make.
    """
    path, split = _parse(name)
    from datasets import DatasetDict, load_dataset  # seconds of imports, and only this path needs them

    try:
        loaded = load_dataset(path, split=split or None)
    except (
        Exception
    ) as error:  # every builder raises its own kind, and all mean that the user's data set was not to be had
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"facts.path: {name}: datasets cannot load it ({type(error).__name__}: {reason}); give a local JSON file"
        ) from None
    if isinstance(loaded, DatasetDict):
        loaded = loaded[_choose(name, list(loaded))]
    return [{field: value for field, value in record.items() if value is not None} for record in loaded]


def _parse(name: str) -> tuple[str, str]:
    if Path(name).is_dir():
        return name, ""
    path, _, split = name.partition(":")
    if Path(name).is_absolute() or path.count("/") != 1:
        raise InputError(
            f"facts.path: {name}: no such file or folder, and not a hub id (owner/name or owner/name:split)"
        )
    return path, split


def _choose(name: str, splits: list[str]) -> str:
    if len(splits) > 1 and "train" not in splits:
        raise InputError(
            f"facts.path: {name} has the splits {', '.join(splits)}; name one, as in {name}:{splits[0]}"
        )
    return "train" if "train" in splits else splits[0]
