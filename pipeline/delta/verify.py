"""Verify: compare a result, read from the disk, with its manifest and with its virtual model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from pipeline.context import Progress
from pipeline.delta.explain import changed_inputs, explain
from pipeline.delta.manifest import ARITHMETIC_VERSION, read_manifest
from pipeline.delta.match import is_recomputed
from pipeline.delta.virtual import Virtual, open_virtual
from pipeline.errors import InputError
from pipeline.weights import stream
from pipeline.weights.digest import content_digest
from pipeline.weights.floats import Array, count_not_finite
from pipeline.weights.formats.layout import read_index
from pipeline.weights.formats.safetensors import INDEX, SafetensorsSource
from pipeline.weights.io.direct import Io
from pipeline.weights.journal import Journal
from pipeline.weights.shard import parse_size
from pipeline.weights.slices import SliceReader, room_for
from pipeline.weights.source import DTYPE_BYTES, TensorInfo

Digests = Mapping[str, Mapping[str, str]]
"""{file: {tensor: blake3 of its bytes}}."""


class Verdict(NamedTuple):
    """What verifying found."""

    problems: list[str]
    """Each names what differs; empty: the result is what it should be."""
    notes: list[str]
    """Why the result could not be compared with its inputs: they have gone, or another flearn made it."""
    unfinished: str = ""
    """Of a result that is not finished: how far it is."""

    @property
    def is_good(self) -> bool:
        return not self.problems and not self.unfinished

    @property
    def summary(self) -> str:
        """What was found, in one line."""
        said = [f"{len(self.problems)} differ"] if self.problems else []
        if self.unfinished:
            said.append(self.unfinished)
        if self.notes:
            said = said or ["as it was written"]
            said.append(f"not compared with its inputs: {', '.join(self.notes)}")
        return "; ".join(said) or "as it should be"


def verify(
    out: Path, *, memory: str | int = "256MiB", io: Io = "auto", progress: Progress | None = None
) -> Verdict:
    """Check the result in `out`: every file, every tensor's bytes, and that they are what they should be.

    Of an unfinished result, the finished shards are checked. Of one that another version of flearn made, only
    the bytes are, for its arithmetic or its digests may be others. Raises InputError if `out` is no result of
    `subtract`, or `memory` is too little.
    """
    memory_bytes, progress = parse_size(memory), progress or Progress("", shown=False)
    manifest = read_manifest(out)
    if manifest is None:
        return _verify_unfinished(Journal(out), memory_bytes, io, progress)
    problems = [*_check_files(out, manifest), *_equals_base(manifest)]
    notes, changed = _compare_inputs(manifest)
    with ExitStack() as stack:
        virtual = None
        if not notes and not changed:
            virtual = stack.enter_context(closing(_open_virtual(manifest["recipe"], io)))
        checking = _Checking(_tensors_by_file(manifest), manifest["tensors"], virtual, io, memory_bytes)
        problems += checking.run(out, progress)
    return Verdict([*problems, *changed], notes)


def _open_virtual(recipe: Mapping[str, Any], io: Io) -> Virtual:
    base, tuned = recipe["base"]["path"], recipe["tuned"]["path"]
    rounding, seed = recipe["rounding"], recipe.get("seed", 0)
    return open_virtual(base, tuned, recipe["scale"], recipe["dtype"], rounding, seed, io)


def _verify_unfinished(journal: Journal, memory_bytes: int, io: Io, progress: Progress) -> Verdict:
    if journal.recipe is None:
        inside = journal.out / "model"  # where a run's `forget` stage has it
        if read_manifest(inside) is not None:
            raise InputError(f"{journal.out}: holds no result itself; verify {inside}")
        raise InputError(
            f"{journal.out}: holds no result of `flearn delta subtract`"
            " (its manifest.json is absent, damaged or another program's)"
        )
    if "version" not in journal.recipe:
        raise InputError(
            f"{journal.out}: holds an unfinished model, which `flearn delta subtract` did not begin;"
            " run again what makes it"
        )
    if not _is_of_this_version(journal.recipe):
        begun = "not finished, and begun by another version of flearn, which this one cannot go on with"
        return Verdict([], [], f"{begun}: delete {journal.out} and run the command again")
    shards = {
        file: {name: noted["blake3"] for name, noted in receipt.items()}
        for file, receipt in journal.receipts().items()
    }
    differing = _Checking(shards, {}, None, io, memory_bytes).run(journal.out, progress)
    done = f"not finished, {len(shards)} shards are done{'' if differing else ' and as they were written'}"
    return Verdict(differing, [], f"{done}; run the same command again, it goes on from there")


def _is_of_this_version(recipe: Mapping[str, Any]) -> bool:
    """Whether the recipe's digests mean what this version's do, and its inputs give the same bytes."""
    return bool(recipe.get("version") == ARITHMETIC_VERSION)


def _tensors_by_file(manifest: Mapping[str, Any]) -> Digests:
    shards: dict[str, dict[str, str]] = {shard["file"]: {} for shard in manifest["shards"]}
    for name, tensor in manifest["tensors"].items():
        shards[tensor["file"]][name] = tensor["blake3"]
    return shards


def _check_files(out: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Files that do not belong, a config or tokenizer that has changed, and an index that leads elsewhere."""
    shards = _tensors_by_file(manifest)
    for path in sorted(out.glob("*.safetensors")):
        if path.name not in shards:
            yield f"{path.name}: is not in the manifest"
    for name, digest in manifest.get("extras", {}).items():
        if not (out / name).is_file():
            yield f"{name}: is missing"
        elif blake3((out / name).read_bytes()).hexdigest() != digest:
            yield f"{name}: its bytes are not those that were written"
    if len(shards) == 1:
        return
    try:
        weight_map = read_index(out / INDEX)
    except OSError as error:
        yield f"{INDEX}: cannot be read ({type(error).__name__})"
        return
    except InputError as error:
        yield str(error)
        return
    right = {name: file for file, tensors in shards.items() for name in tensors}
    for name in sorted({name for name, _ in weight_map.items() ^ right.items()}):
        yield f"{INDEX}: says that {name} lies in {weight_map.get(name)}; it lies in {right.get(name)}"


def _equals_base(manifest: Mapping[str, Any]) -> Iterator[str]:
    survival = manifest["survival"]
    if manifest["recipe"].get("undoes"):  # a 16-bit base may well equal the rounded theta'
        return
    if survival["share_changed"] == 0 and survival["delta_norm"] > 0 and manifest["recipe"]["scale"] != 0:
        yield f"the result equals its base: every change was lost in {manifest['dtype']}"


def _compare_inputs(manifest: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Why the result cannot be computed again, and which inputs have changed as far as their digests see
    it.
    """
    recipe = manifest["recipe"]
    if not _is_of_this_version(recipe):
        return ["it was made by another version of flearn"], []
    gone, changed = [], []
    for role in ("base", "tuned"):
        path = Path(recipe[role]["path"])
        if not path.exists():
            gone.append(f"the {role} model {path} is not there")
        elif content_digest(path) != recipe[role]["digest"]:
            changed.append(f"the {role} model {path} has changed since the result was made")
    return gone, changed


class _Job(NamedTuple):
    """A tensor to check."""

    file: str
    reader: SliceReader
    info: TensorInfo
    digest: str
    """What the manifest says of it."""


class _Found(NamedTuple):
    """What reading a tensor showed."""

    wrong: list[str]
    """Of its own bytes."""
    is_equal: bool
    """Whether they are those of the virtual model."""
    objection: str
    """Why the virtual model could not be computed, if so: an input has changed."""


class _Checking:
    """Compares the tensors of a result with their digests and their virtual model, on a few threads."""

    def __init__(
        self,
        shards: Digests,
        noted: Mapping[str, Any],
        virtual: Virtual | None,
        io: Io,
        memory_bytes: int,
    ) -> None:
        """`noted`: what the manifest says of each tensor. Raises InputError for too little memory."""
        self._shards = shards
        self._noted = noted
        self._virtual = virtual
        self._io = io
        computing = 0 if virtual is None else virtual.thread_bytes + stream.CHUNK_BYTES
        per_thread = room_for(stream.CHUNK_BYTES) + computing
        self._num_threads = min(stream.MAX_THREADS, memory_bytes // per_thread)
        if self._num_threads == 0:
            needed = f"{(per_thread >> 20) + 1}MiB"
            raise InputError(f"--memory: {memory_bytes} bytes are too few; these models need {needed}")
        self._is_over = threading.Event()
        # Explaining takes memory of its own: one thread at a time.
        self._explaining = threading.Lock()

    def run(self, out: Path, progress: Progress) -> list[str]:
        """All problems of the shards in `out`."""
        problems: list[str] = []
        with ExitStack() as stack:
            jobs: list[_Job] = []
            for file, digests in self._shards.items():
                source, wrong = _open_shard(out / file, digests)
                problems += wrong
                if source is None:
                    continue
                stack.callback(source.close)
                reader = SliceReader(source, self._io, may_use_cache=False)
                stack.callback(reader.close)
                infos = [info for name, info in source.tensors.items() if name in digests]
                jobs += [_Job(file, reader, info, digests[info.name]) for info in infos]
            progress.start(sum(job.info.num_bytes for job in jobs))
            if self._virtual is not None:
                stack.enter_context(self._virtual.many_threads())
            pool = ThreadPoolExecutor(self._num_threads)
            # Where this is interrupted, threads end with the slice that they are at.
            stack.callback(pool.shutdown, cancel_futures=True)
            stack.callback(self._is_over.set)
            for job, found in zip(jobs, pool.map(self._check, jobs), strict=True):
                problems += found
                progress.advance(job.info.num_bytes)
        return problems

    def _check(self, job: _Job) -> list[str]:
        """What is wrong with one tensor."""
        info = job.info
        virtual = self._virtual
        if virtual is not None and virtual.tensors.get(info.name) != info:
            virtual = None  # of another shape or dtype there is nothing to compare
        try:
            found = self._read(job, virtual)
        except InputError as error:
            return [str(error)]
        problem = f"{info.name} in {job.file}: {', '.join(found.wrong)}"
        if virtual is None:
            return [problem] if found.wrong else []
        if found.is_equal:
            right = "it holds the right values; its digest in the manifest is wrong"
            return [f"{problem}: {right}"] if found.wrong else []
        with self._explaining:
            # The arithmetic is the same in every process: an input must have changed, or the manifest has.
            changed = changed_inputs(virtual, info, self._noted[info.name].get("inputs", {}))
            changed = changed or ([found.objection] if found.objection else [])
            if changed:
                return [*changed, *([problem] if found.wrong else [])]
            if found.wrong:
                return [f"{problem}: {explain(info.name, job.reader, virtual)}"]
        return [f"{info.name}: the manifest's digest is not that of base - scale * (tuned - base)"]

    def _read(self, job: _Job, virtual: Virtual | None) -> _Found:
        """Read a tensor from the disk. Raises InputError if that fails."""
        info, digest, num_not_finite, is_equal, objection = job.info, blake3(), 0, True, ""
        num_at_once = stream.CHUNK_BYTES // DTYPE_BYTES[info.dtype]
        for start in range(0, info.num_elements, num_at_once):
            if self._is_over.is_set():
                break
            stop = min(start + num_at_once, info.num_elements)
            values = job.reader.read(info.name, start, stop)
            digest.update(values.view(np.uint8).data)
            if info.is_floating and not is_recomputed(info):
                num_not_finite += count_not_finite(values)
            if virtual is not None and is_equal:
                try:
                    is_equal = _equals(values, virtual.read(info.name, start, stop))
                except InputError as error:  # the rest is compared with its digest yet
                    is_equal, objection = False, str(error)
        wrong = ["is empty"] if info.num_elements == 0 else []
        if num_not_finite:
            wrong.append(f"{num_not_finite} elements are NaN or infinite")
        if digest.hexdigest() != job.digest:
            wrong.append("its bytes are not those that were written")
        return _Found(wrong, is_equal, objection)


def _equals(one: Array, two: Array) -> bool:
    """Whether two arrays have the same bytes: -0 is not 0 here, and NaN is itself."""
    return np.array_equal(one.view(np.uint8), two.view(np.uint8))


def _open_shard(path: Path, digests: Mapping[str, str]) -> tuple[SafetensorsSource | None, list[str]]:
    """A shard, and what is wrong with the list of its tensors."""
    if not path.is_file():
        return None, [f"{path.name}: is missing"]
    try:
        source = SafetensorsSource(path)
    except InputError as error:
        return None, [str(error)]
    wrong = []
    for name in sorted(digests.keys() ^ source.tensors.keys()):
        wrong.append(f"{name}: is {'missing from' if name in digests else 'a stranger in'} {path.name}")
    return source, wrong
