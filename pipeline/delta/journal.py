"""What is done and what is not: the output folder's mark, a receipt for each finished shard, and the
manifest, last.

    OUT/.incomplete/recipe/           what is being made; the folder `.incomplete` is also the mark by which
    readers refuse OUT OUT/.incomplete/<shard>.json      receipt: written after the shard was synced and
    renamed into place OUT/manifest.json                 written last: OUT is complete. Then `.incomplete`
    goes.

Each of these is one file, written aside (in `.incomplete`), synced and renamed, so a kill leaves it whole or
absent, and no litter. Workers on a shared folder need no lock: whatever two of them do twice ends in the same
bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.artifact import MANIFEST, sync, write_json
from pipeline.delta.manifest import is_manifest, is_receipt
from pipeline.errors import InputError
from pipeline.weights.aside import sweep
from pipeline.weights.shard import Shard
from pipeline.weights.writer import INCOMPLETE

_ADVICE = "give another --out, or delete this one"


class Journal:
    """The state of one output folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._folder = out / INCOMPLETE

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest if the output is complete, else None. (Another program's file of that name is
        none.)
        """
        manifest = _read(self.out / MANIFEST)
        return manifest if is_manifest(manifest) else None

    @property
    def recipe(self) -> dict[str, Any] | None:
        """What an unfinished output is going to be, or None if none was begun."""
        return _read(self._folder / "recipe" / "recipe.json")

    def claim(self, recipe: dict[str, Any], require_room: Callable[[], None]) -> dict[str, Any] | None:
        """Begin, or go on with, making `recipe` here; the manifest if that is already done.

        `require_room` is called before anything is begun, and raises InputError if there is too little.
        Raises InputError if the folder holds anything else.
        """
        # In this order: what a fellow worker puts here meanwhile is no stranger.
        strangers = sorted(path.name for path in self.out.glob("*") if path.name != INCOMPLETE)
        if self.recipe is None and self.manifest is None:
            with self._unless_complete():
                self._begin(recipe, strangers, require_room)
        # And in this: a fellow worker that completes the output writes the manifest, and then removes the
        # recipe. Also one that did so while this one began: then there are both, and the manifest counts.
        begun, manifest = self.recipe, self.manifest
        if manifest is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._require_same(manifest["recipe"], recipe, "holds a finished result")
        elif begun is None:
            raise InputError(f"{self._folder}: damaged; {_ADVICE}")
        else:
            self._require_same(begun, recipe, "holds an unfinished result")
        with suppress(OSError):  # a finished result may be another user's, and read-only
            sweep(self.out)
        return manifest

    def _begin(self, recipe: dict[str, Any], strangers: list[str], require_room: Callable[[], None]) -> None:
        if (self.out.exists() or self.out.is_symlink()) and not self.out.is_dir():
            raise InputError(f"{self.out}: is not a folder; {_ADVICE}")
        if strangers:
            raise InputError(
                f"{self.out}: is not empty ({', '.join(strangers[:3])}) and was not made by this command; {_ADVICE}"
            )
        require_room()
        aside = self._folder / uuid4().hex
        aside.mkdir(parents=True)
        write_json(aside / "recipe.json", recipe)
        try:  # the first of several workers decides; a folder, because not every file system has links, but every one refuses this
            os.rename(aside, self._folder / "recipe")
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            shutil.rmtree(aside)
        sync(self._folder)
        sync(self.out)

    def _require_same(self, found: dict[str, Any], recipe: dict[str, Any], state: str) -> None:
        differing = [
            key
            for key in sorted({*found, *recipe})
            if _identity(found.get(key)) != _identity(recipe.get(key))
        ]
        if differing:
            said = ", ".join(_difference(key, found.get(key), recipe.get(key)) for key in differing)
            raise InputError(f"{self.out}: {state} of another recipe ({said}); {_ADVICE}")

    def receipt(self, shard: Shard) -> dict[str, Any] | None:
        """What was recorded of a finished shard, if it is still there; None if it has to be made."""
        receipt = _read(self._folder / f"{shard.file_name}.json")
        return (
            receipt
            if is_receipt(receipt, [info.name for info in shard.tensors]) and shard.is_written(self.out)
            else None
        )

    def receipts(self) -> dict[str, dict[str, Any]]:
        """All receipts of an unfinished output, by the shard's file name."""
        files = sorted(self._folder.glob("*.json"))
        return {
            path.name.removesuffix(".json"): receipt
            for path in files
            if (receipt := _read(path)) and is_receipt(receipt)
        }

    def record(self, shard: Shard, receipt: dict[str, Any]) -> None:
        """Note that `shard` is in place, with what is to be known of it."""
        if self.manifest is None:
            with self._unless_complete():
                write_json(self._folder / f"{shard.file_name}.json", receipt)
        if (
            self.manifest is not None
        ):  # a faster worker completed it, and removed the folder that this may just have made again
            shutil.rmtree(self._folder, ignore_errors=True)

    def commit(self, manifest: dict[str, Any], write_files: Callable[[Path], None]) -> None:
        """Put the files that `write_files` makes in a folder beside the shards, then the manifest: the output
        is complete.
        """
        aside = self._folder / uuid4().hex
        with self._unless_complete():
            aside.mkdir()
            write_files(aside)
            for path in sorted(path for path in aside.rglob("*") if path.is_file()):
                target = self.out / path.relative_to(aside)
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
                sync(target.parent)
            write_json(aside / MANIFEST, manifest)
            os.replace(aside / MANIFEST, self.out / MANIFEST)
            sync(self.out)
        sweep(self.out)
        shutil.rmtree(self._folder, ignore_errors=True)
        sync(self.out)

    @contextmanager
    def _unless_complete(self) -> Iterator[None]:
        """Where two workers did the same, one may complete the output and remove `.incomplete` under the
        other's hands: no harm.
        """
        try:
            yield
        except (
            FileNotFoundError,
            FileExistsError,
        ):  # the latter from a mkdir that lost its folder while it looked at it
            if self.manifest is None:
                raise


def _identity(value: Any) -> Any:
    """A recipe's field without the paths in it: a moved model is the same model."""
    return {key: item for key, item in value.items() if key != "path"} if isinstance(value, dict) else value


def _difference(key: str, found: Any, wanted: Any) -> str:
    there, here = (
        value.get("path", value) if isinstance(value, dict) else value for value in (found, wanted)
    )
    return f"{key} {there} instead of {here}" if there != here else f"{key} {there} with other contents"


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none, or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
