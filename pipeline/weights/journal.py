"""The journal of a model folder in the making: what is begun, which shards are done, in the end the manifest.

    OUT/.incomplete/recipe/          what is being made; while `.incomplete` is there, readers refuse OUT
    OUT/.incomplete/<shard>.json     receipt: written after the shard was synced and renamed into place
    OUT/manifest.json                written last: OUT is complete; then `.incomplete` goes

Each is one file, written aside (in `.incomplete`), synced and renamed: a kill leaves it whole or absent.
Workers on a shared folder need no lock: whatever two of them do twice ends in the same bytes.
Imports no numpy: planning asks which parts are missing.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.artifact import MANIFEST, sync, write_json
from pipeline.errors import InputError
from pipeline.weights.io.staged import sweep
from pipeline.weights.shard import Shard

INCOMPLETE = ".incomplete"
"""The journal's folder, by which readers know a model folder that is not whole."""

Receipt = dict[str, dict[str, Any]]
"""Of a finished shard, for each of its tensors: blake3 of its bytes, and what its source noted."""

Kinds = Mapping[str, "type | tuple[type, ...]"]

_ADVICE = "give another --out, or delete this one"

_MANIFEST_FIELDS: Kinds = {"recipe": dict, "dtype": str, "num_bytes": int, "shards": list, "tensors": dict}
_SHARD_FIELDS: Kinds = {"file": str, "num_bytes": int}
_TENSOR_FIELDS: Kinds = {"file": str, "dtype": str, "blake3": str}


def has_fields(value: Any, kinds: Kinds) -> bool:
    """Whether a value of a JSON file is an object with these fields, each of its kind."""
    absent = object()
    return isinstance(value, dict) and all(
        isinstance(value.get(name, absent), kind) for name, kind in kinds.items()
    )


def _is_manifest(value: Any) -> bool:
    """Whether this is a manifest of ours, as far as every reader needs it. Other programs write such files,
    too.
    """
    if not has_fields(value, _MANIFEST_FIELDS):
        return False
    extras = value.get("extras", {})  # older ones have none
    if not isinstance(extras, dict) or not all(isinstance(digest, str) for digest in extras.values()):
        return False
    shards, tensors = value["shards"], value["tensors"].values()
    if not all(has_fields(one, _SHARD_FIELDS) for one in shards):
        return False
    files = {shard["file"] for shard in shards}
    return bool(files) and all(has_fields(one, _TENSOR_FIELDS) and one["file"] in files for one in tensors)


Check = Callable[[dict[str, Any]], bool]


def _anything(value: dict[str, Any]) -> bool:
    return True


class Journal:
    """The state of one output folder."""

    def __init__(self, out: Path, is_noted: Check = _anything, is_manifest: Check = _anything) -> None:
        """What a file must have besides the writer's own fields, so as not to be another program's.

        Args:
            is_noted: Whether a tensor's entry in a receipt has what its source notes.
            is_manifest: Whether a manifest has what its readers look for.
        """
        self.out = out
        self._folder = out / INCOMPLETE
        self._is_noted = is_noted
        self._is_manifest = is_manifest

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest if the output is complete, else None. Another program's file of that name is none."""
        manifest = _read(self.out / MANIFEST)
        is_ours = manifest is not None and _is_manifest(manifest) and self._is_manifest(manifest)
        return manifest if is_ours else None

    @property
    def recipe(self) -> dict[str, Any] | None:
        """What an unfinished output is going to be, or None if none was begun."""
        return _read(self._folder / "recipe" / "recipe.json")

    def claim(self, recipe: dict[str, Any], require_room: Callable[[], None]) -> dict[str, Any] | None:
        """Begin, or go on with, making `recipe` here; the manifest if that is already done.

        `require_room` is called before anything is begun, and raises InputError if there is too little.
        Raises InputError if the folder holds anything else.
        """
        # Strangers are looked for first: what a fellow worker puts here meanwhile is none.
        strangers = sorted(path.name for path in self.out.glob("*") if path.name != INCOMPLETE)
        if self.recipe is None and self.manifest is None:
            with self._unless_complete():
                self._begin(recipe, strangers, require_room)
        # The recipe is read before the manifest, for a fellow that completes the output writes the manifest
        # and then removes the recipe. If it did so while this one began, both are there, and the manifest
        # counts.
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
                f"{self.out}: is not empty ({', '.join(strangers[:3])}) and was not made by this command;"
                f" {_ADVICE}"
            )
        require_room()
        aside = self._folder / uuid4().hex
        aside.mkdir(parents=True)
        write_json(aside / "recipe.json", recipe)
        # The first of several workers decides. A folder, because every file system refuses to rename one onto
        # another that is not empty; links, which would do as well, not every one has.
        try:
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

    def receipt(self, shard: Shard) -> Receipt | None:
        """What was recorded of a finished shard, if it is still there; None if it has to be made."""
        receipt = _read(self._folder / f"{shard.file_name}.json")
        names = {info.name for info in shard.tensors}
        is_good = receipt is not None and receipt.keys() == names and self._is_receipt(receipt)
        return receipt if is_good and shard.is_written(self.out) else None

    def receipts(self) -> dict[str, Receipt]:
        """All receipts of an unfinished output, by the shard's file name."""
        found = {}
        for path in sorted(self._folder.glob("*.json")):
            receipt = _read(path)
            if receipt and self._is_receipt(receipt):
                found[path.name.removesuffix(".json")] = receipt
        return found

    def _is_receipt(self, value: dict[str, Any]) -> bool:
        return all(has_fields(noted, {"blake3": str}) and self._is_noted(noted) for noted in value.values())

    def record(self, shard: Shard, receipt: Receipt) -> None:
        """Note that `shard` is in place, with what is to be known of it."""
        if self.manifest is None:
            with self._unless_complete():
                write_json(self._folder / f"{shard.file_name}.json", receipt)
        # A faster worker may have completed it, and removed the folder that this has just made again.
        if self.manifest is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def commit(self, manifest: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Put `files` (by their names in the folder) beside the shards, then the manifest: the output is
        complete.

        Each is written aside first, so no kill leaves half of one. The manifest's rename is the moment from
        which the output counts as whole.
        """
        aside = self._folder / uuid4().hex
        with self._unless_complete():
            aside.mkdir()
            for number, (name, content) in enumerate(files.items()):
                _write(aside / str(number), content)
                target = self.out / name
                target.parent.mkdir(exist_ok=True)
                os.replace(aside / str(number), target)
                sync(target.parent)
            write_json(aside / MANIFEST, manifest)
            os.replace(aside / MANIFEST, self.out / MANIFEST)
            sync(self.out)
        sweep(self.out)
        shutil.rmtree(self._folder, ignore_errors=True)
        sync(self.out)

    @contextmanager
    def _unless_complete(self) -> Iterator[None]:
        """One of two workers that do the same may complete the output and remove `.incomplete`: no harm."""
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            # The latter comes from a mkdir that lost its folder while it looked at it.
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


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


Part = tuple[int, int]
"""(index from 0, number of parts): one worker's share of a model folder."""


def note_done(folder: Path, part: Part) -> None:
    """Note beside the model folder that every shard of `part` is in place."""
    write_json(_note(folder, part), {})


def missing_parts(folder: Path, num_parts: int) -> list[Part]:
    """The parts yet to be done. All, where all are noted: then the completing of the result was
    interrupted.
    """
    parts = [(index, num_parts) for index in range(num_parts)]
    return [part for part in parts if not _note(folder, part).is_file()] or parts


def _note(folder: Path, part: Part) -> Path:
    return folder / f"part-{part[0] + 1}-of-{part[1]}.json"
