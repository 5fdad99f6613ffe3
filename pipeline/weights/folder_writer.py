"""The one writer of model folders: any tensor source becomes safetensors, index, config and manifest.

A few threads read, write and hash chunks of shards, so that these overlap. A run that was killed goes on with
the shard it was at, and N workers may share one folder (`part`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import disk_usage
from typing import Any, Literal, NamedTuple

from blake3 import blake3
from rich.filesize import decimal

from pipeline.context import Progress
from pipeline.errors import InputError
from pipeline.weights.formats.safetensors import INDEX
from pipeline.weights.io.direct import Io
from pipeline.weights.io.staged import StagedFile
from pipeline.weights.journal import Check, Journal, Part, Receipt
from pipeline.weights.shard import Shard, index_of
from pipeline.weights.source import TensorInfo, main_dtype
from pipeline.weights.stream import Stream, WritableSource

Describe = Callable[[Receipt, Mapping[str, Any]], dict[str, Any]]
"""(receipts of all tensors, the writer's own fields of the manifest) -> further fields."""


class Content(NamedTuple):
    """What a model folder is to hold, once its source is known."""

    shards: Sequence[Shard]
    extras: Mapping[str, bytes]
    """{file name: content} of what goes beside the weights."""
    recipe: Mapping[str, Any]
    """All that decides the bytes. A folder that was begun with another recipe is refused."""


class Outcome(NamedTuple):
    """What a call came to."""

    state: Literal["written", "found", "waiting"]
    """`found`: it was complete before; `waiting`: this part is done, other parts are not."""
    manifest: dict[str, Any]
    """Of the complete folder; empty while waiting."""
    num_waiting: int
    """Shards that other parts have yet to write."""


def write_folder(
    source: WritableSource,
    out: Path,
    content: Content,
    *,
    describe: Describe = lambda noted, manifest: {},
    is_manifest: Check = lambda manifest: True,
    memory_bytes: int = 256 << 20,
    io: Io = "auto",
    part: Part = (0, 1),
    announce: Callable[[Sequence[Shard]], None] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Write `source` into the folder `out`.

    Args:
        source: Its aliases (tied weights) are not written.
        out: A new folder, or one that was begun with the same recipe.
        describe: What the manifest is to have besides the writer's fields, from these and all tensors'
            receipts.
        is_manifest: Whether a manifest that is found has what `describe` gives.
        memory_bytes: The most to use for buffers.
        io: How shards are written.
        part: (i, n): write every n-th shard, from the i-th on (from 0). Who finishes last completes `out`.
        announce: Called before the work, with the shards that this call writes.
        progress: Moved on by bytes.

    Raises:
        InputError: `out` holds something else, the disk or the memory is too small, or what the source
            raises.
    """
    journal = Journal(out, source.is_noted, is_manifest)
    recipe = dict(content.recipe)
    stream = Stream(source, memory_bytes)
    shards = content.shards[part[0] :: part[1]]
    manifest = journal.claim(recipe, lambda: require_free(out, num_bytes_of(shards)))
    if manifest is not None:
        _require_whole(out, content, manifest)
        return Outcome("found", manifest, 0)
    # Room was looked for before the claim, so that nothing is begun in vain; now what is left may need less.
    missing = [shard for shard in shards if journal.receipt(shard) is None]
    require_free(out, num_bytes_of(missing))
    if announce is not None and missing:
        announce(missing)
    stream.run(
        missing,
        open_output=lambda shard: StagedFile(out / shard.file_name, shard.num_bytes, io),
        on_whole=journal.record,
        progress=progress or Progress("", shown=False),
    )
    return _finish(journal, content, recipe, describe)


def _require_whole(out: Path, content: Content, manifest: dict[str, Any]) -> None:
    """Raises InputError if a finished folder has lost a file, or has another in a shard's place.

    Sizes and headers are looked at; `flearn delta verify` reads the rest.
    """
    lost = []
    for shard in content.shards:
        if not shard.is_written(out):
            is_there = (out / shard.file_name).is_file()
            lost.append(f"{shard.file_name} {'has another size or header' if is_there else 'is missing'}")
    names = [*_index(content.shards), *manifest.get("extras", {})]  # older manifests do not note extras
    lost += [f"{name} is missing" for name in names if not (out / name).is_file()]
    if lost:
        advice = f"restore what is lost, or delete {out} and run again"
        raise InputError(f"{out}: was finished, but {', '.join(lost)}; {advice}")


def _index(shards: Sequence[Shard]) -> dict[str, bytes]:
    """The index by its file name, where there are several shards."""
    if len(shards) == 1:
        return {}
    return {INDEX: (json.dumps(index_of(shards), indent=2, ensure_ascii=False) + "\n").encode()}


def _finish(journal: Journal, content: Content, recipe: dict[str, Any], describe: Describe) -> Outcome:
    """If every part is done, put index, config and tokenizer beside the shards, then the manifest."""
    receipts = [journal.receipt(shard) for shard in content.shards]
    num_waiting = receipts.count(None)
    if num_waiting:
        found = journal.claim(recipe, lambda: None)  # another worker may have completed the output just now
        return Outcome("written", found, 0) if found is not None else Outcome("waiting", {}, num_waiting)
    noted: Receipt = {}
    for receipt in receipts:
        noted |= receipt or {}
    manifest = _manifest(content, recipe, noted)
    manifest |= describe(noted, manifest)
    journal.commit(manifest, {**_index(content.shards), **content.extras})
    return Outcome("written", manifest, 0)


def _manifest(content: Content, recipe: dict[str, Any], noted: Receipt) -> dict[str, Any]:
    tensors = {}
    for shard in content.shards:
        for info in shard.tensors:
            tensors[info.name] = {
                "file": shard.file_name,
                "dtype": info.dtype,
                "shape": list(info.shape),
                "blake3": noted[info.name]["blake3"],
            }
    return {
        "tool": f"flearn {_version()}",
        "recipe": recipe,
        "dtype": main_dtype(tensors_of(content.shards)),
        "num_bytes": num_bytes_of(content.shards),
        "shards": [{"file": shard.file_name, "num_bytes": shard.num_bytes} for shard in content.shards],
        "extras": {name: blake3(data).hexdigest() for name, data in content.extras.items()},
        "tensors": tensors,
    }


def _version() -> str:
    try:
        return version("flearn")
    except PackageNotFoundError:
        return "(not installed)"


def tensors_of(shards: Sequence[Shard]) -> list[TensorInfo]:
    """The tensors of all `shards`."""
    return [info for shard in shards for info in shard.tensors]


def num_bytes_of(shards: Sequence[Shard]) -> int:
    """The sum of the files' sizes."""
    return sum(shard.num_bytes for shard in shards)


def require_free(folder: Path, num_bytes: int) -> None:
    """Raises InputError unless the disk under `folder` (which need not be there yet) has `num_bytes` free."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise InputError(
            f"{folder}: {decimal(num_bytes)} are needed and {decimal(free)} are free;"
            " free some space or choose another disk"
        )


def free_bytes(folder: Path) -> int:
    """What is free on the disk under `folder`, or under what will hold it."""
    return disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
