"""Checkpoints to resume from: a folder per step, complete exactly when its manifest agrees with its files.

DeepSpeed's own mark (`latest`) is written in place, and a killed save leaves truncated files that look like a
checkpoint. So the manifest is ours, written last by rename, with every file's size. A new checkpoint never
overwrites an old one; the old one goes when the new one is complete.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.artifact import sync, write_json
from pipeline.context import Context, log
from pipeline.errors import InputError

if TYPE_CHECKING:  # the doctor, which imports no torch, asks how large a checkpoint is
    from pipeline.train.zero_engine import ZeroEngine

_MANIFEST = "complete.json"


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint: the state after `step` optimizer steps, in one part per rank."""

    folder: Path
    step: int
    num_ranks: int


def num_bytes(
    num_trained: int, precision: Literal["bf16", "fp32"], zero_stage: int, with_moments: bool = True
) -> int:
    """What one checkpoint holds, over all ranks.

    Per trained parameter: 4 bytes of master, 8 of moments (the last one of a training leaves them out), and
    below ZeRO-3 the weight itself.
    """
    weights = {"bf16": 2, "fp32": 4}[precision] if zero_stage < 3 else 0
    return num_trained * ((12 if with_moments else 4) + weights)


class Checkpoints:
    """The checkpoints of one training. Every method but `find` is collective."""

    def __init__(self, folder: Path, context: Context) -> None:
        self.folder = folder
        self._context = context

    def latest(self) -> Saved | None:
        """The newest complete checkpoint; whatever else lies there is removed."""
        saved: Saved | None = None
        if self._context.is_main:
            saved = max(self.find(), key=lambda found: found.step, default=None)
            self._remove_all_but(saved)
        shared: Saved | None = self._context.share(saved)
        return shared

    def find(self) -> list[Saved]:
        """All complete checkpoints."""
        return [saved for folder in self.folder.glob("step-*") if (saved := _read(folder)) is not None]

    def save(self, engine: ZeroEngine, step: int, with_moments: bool = True) -> Saved:
        """Save the engine's state after `step` steps. Raises OSError (ENOSPC) if the disk is full."""
        tag = f"step-{step:08d}"
        folder = self.folder / tag
        assert not folder.exists(), folder
        with _full_disk_named(folder):
            engine.save(self.folder, tag, with_moments)
        _sync(folder)  # on every rank: only the node that wrote a file can force it to a shared disk
        self._context.barrier()  # before the manifest: it vouches for all ranks' files
        saved = Saved(folder, step, self._context.world_size)
        if self._context.is_main:
            manifest = {"step": step, "num_ranks": saved.num_ranks, "files": _sizes(folder)}
            write_json(folder / _MANIFEST, manifest)
            sync(self.folder)  # else the new folder could be lost with the power, after the old one is gone
            self._remove_all_but(saved)
        self._context.barrier()  # no rank goes on, and perhaps reports success, before it is complete
        return saved

    def load(self, engine: ZeroEngine, saved: Saved) -> None:
        """Put `saved` into an engine: masters, moments, weights.

        Raises InputError if another number of ranks saved it: DeepSpeed's partitions are theirs.
        """
        if saved.num_ranks != self._context.world_size:
            raise InputError(
                f"{saved.folder}: saved by {saved.num_ranks} ranks, but this run has"
                f" {self._context.world_size}; set cluster.ranks={saved.num_ranks}, or delete it to begin"
                " anew"
            )
        if engine.load(self.folder, saved.folder.name) != saved.step:
            raise RuntimeError(f"{saved.folder}: DeepSpeed did not load this checkpoint")
        log.info("resuming after step %d", saved.step)

    def remove(self) -> None:
        """Delete all checkpoints."""
        if self._context.is_main:
            self._remove_all_but(None)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_all_but(self, kept: Saved | None) -> None:
        for folder in self.folder.glob("step-*"):
            if kept is None or folder != kept.folder:
                # The manifest first: a half-deleted checkpoint must not pass for a whole one.
                (folder / _MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder)


@contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    """torch calls a full disk (or quota) a RuntimeError about positions in its zip file: say what it is."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def _read(folder: Path) -> Saved | None:
    """The checkpoint in `folder`, or None if it is not complete."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if manifest["files"] != _sizes(folder):
        log.warning("%s: its files are not those that were saved; it is not used", folder)
        return None
    return Saved(folder, manifest["step"], manifest["num_ranks"])


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != _MANIFEST}


def _sync(folder: Path) -> None:
    """Force the content of `folder` to the disk."""
    for path in folder.iterdir():
        sync(path)
    sync(folder)
