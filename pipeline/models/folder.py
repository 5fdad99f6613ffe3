"""Writing a model folder so that it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.artifact import sync


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to write into; on a clean exit it is synced and takes `folder`'s name.

    What a killed run left aside is thrown away. Raises OSError if `folder` exists and is not empty.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes for the owner alone; a model folder is often shared
            sync(file)
        sync(aside)
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(folder.parent)
