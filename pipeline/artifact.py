"""A stage's output folder: named by a fingerprint, complete exactly when its `manifest.json` exists.

A folder without a manifest is work in progress: its stage may go on with what it finds there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from pipeline.errors import InputError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A stage's folder, and what its manifest says."""

    folder: Path

    @property
    def is_complete(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of a complete artifact. Raises InputError if it is absent or unreadable."""
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: this stage has not finished; run the experiment again") from None
        except ValueError as error:
            raise InputError(f"{path}: damaged ({error}); delete {self.folder} and run again") from None
        assert isinstance(manifest, dict)
        return manifest

    @property
    def result(self) -> dict[str, Any]:
        """What the stage returned. Raises InputError if another version of flearn made the artifact."""
        result = self.manifest.get("result")
        if not isinstance(result, dict):
            raise InputError(f"{self.folder}: was made by another flearn; delete it and run again")
        return result

    @property
    def model_path(self) -> Path | str:
        """Where the model that this stage made or names lies; its result says so as `"model"`.

        That is a path relative to the folder, an absolute path, or a hub id.
        """
        model: str = self.result["model"]
        inside = self.folder / model
        return inside if inside.exists() else model

    @property
    def model_folder(self) -> Path:
        """The Hugging Face folder with the model's config and tokenizer: this artifact's own, or that of the
        model it was tuned from.

        Raises InputError if the folder has gone.
        """
        if self.result["model_kind"] != "folder":
            return self.input("model").model_folder
        folder = Path(self.model_path)
        if not folder.is_dir():
            raise InputError(
                f"{folder}: the model's folder has gone; put it back, or delete {self.folder} and run again"
            )
        return folder

    def input(self, role: str) -> Artifact:
        """The artifact that this one was made from in that role.

        The manifest names it as it lies to this one's parent folder (stages of a run lie side by side), or by
        an absolute path (a result of another run).
        """
        return Artifact(self.folder.parent / self.manifest["inputs"][role])

    def retract(self) -> None:
        """Make the artifact incomplete again: its stage then runs once more over what is there."""
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def commit(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, by rename. It comes last: from now on the artifact is complete."""
        write_json(self.folder / MANIFEST, manifest)


def fingerprint(stage: str, version: int, recipe: dict[str, Any], inputs: dict[str, str]) -> str:
    """12 hex digits that name a result by all that decides it."""
    text = json.dumps(
        [stage, version, recipe, inputs], sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON: whole or not at all, and on the disk when this returns."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`: whole or not at all, and on the disk when this returns."""
    with replacing(path) as file:
        file.write(text.encode())
    sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into. A clean exit syncs it and gives it `path`'s name; an error deletes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which on a clean exit is synced and takes `folder`'s name.

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


def sync(path: Path) -> None:
    """Force a file's content to the disk; of a folder its names, so that a rename survives a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
