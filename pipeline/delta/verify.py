"""Verify: read a result again, against its manifest and, where they are still there, against the models it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blake3 import blake3

from pipeline.artifact import content_digest
from pipeline.delta.arithmetic import Formula
from pipeline.delta.chunks import CHUNK_BYTES
from pipeline.delta.disk import Io, SliceReader, page_memory, room_for
from pipeline.delta.explain import explain
from pipeline.delta.journal import Journal
from pipeline.delta.plan import Plan, is_recomputed, make_plan
from pipeline.delta.stream import Receipt, Stream
from pipeline.errors import InputError
from pipeline.weights.open import open_source
from pipeline.weights.safetensors import INDEX, SafetensorsSource
from pipeline.weights.shard import parse_size
from pipeline.weights.source import DTYPE_BYTES, TensorInfo, TensorSource

_NUM_READERS = 4


class Verdict(NamedTuple):
    """What verifying found."""

    problems: list[str]
    """Each names what differs; empty: the result is what it should be."""
    notes: list[str]
    """What could not be compared."""


def verify(out: Path, *, memory: str | int = "256MiB", io: Io = "auto") -> Verdict:
    """Check the result in `out`: every file, every tensor's bytes, and that they are base - scale * (tuned - base).

    An unfinished result's finished shards are checked, too. Raises InputError if `out` is no result of `subtract`.
    """
    journal = Journal(out)
    manifest = journal.manifest
    if manifest is None:
        return _verify_unfinished(journal, io)
    shards = _tensors_by_file(manifest)
    problems = [*_files(out, shards), *_equals_base(manifest)]
    differing = _check_shards(out, shards, io)
    more, notes = _against_inputs(out, manifest, differing, parse_size(memory), io)
    return Verdict(problems + more, notes)


def _verify_unfinished(journal: Journal, io: Io) -> Verdict:
    if journal.recipe is None:
        raise InputError(f"{journal.out}: holds no result of `flearn delta subtract` (no manifest.json)")
    shards = {file: {name: noted["blake3"] for name, noted in receipt.items()} for file, receipt in journal.receipts().items()}
    differing = _check_shards(journal.out, shards, io)
    unfinished = f"{journal.out}: not finished, {len(shards)} shards are done; the command that began it goes on with it"
    return Verdict([unfinished, *differing.values()], [])


def _tensors_by_file(manifest: dict[str, Any]) -> dict[str, dict[str, str]]:
    """{file: {tensor: blake3}}."""
    shards: dict[str, dict[str, str]] = {shard["file"]: {} for shard in manifest["shards"]}
    for name, tensor in manifest["tensors"].items():
        shards[tensor["file"]][name] = tensor["blake3"]
    return shards


def _files(out: Path, shards: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Files that do not belong, and an index that leads elsewhere."""
    for path in sorted(out.glob("*.safetensors")):
        if path.name not in shards:
            yield f"{path.name}: is not in the manifest"
    if len(shards) == 1:
        return
    try:
        weight_map = json.loads((out / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield f"{INDEX}: cannot be read ({type(error).__name__})"
        return
    right = {name: file for file, tensors in shards.items() for name in tensors}
    for name in sorted({name for name, _ in weight_map.items() ^ right.items()}):
        yield f"{INDEX}: says that {name} lies in {weight_map.get(name)}; it lies in {right.get(name)}"


def _equals_base(manifest: dict[str, Any]) -> Iterator[str]:
    survival = manifest["survival"]
    if manifest["recipe"].get("undoes"):  # a 16-bit base may well equal the rounded theta'
        return
    if survival["share_changed"] == 0 and survival["delta_norm"] > 0 and manifest["recipe"]["scale"] != 0:
        yield f"the result equals its base: every change was lost in {manifest['dtype']}"


def _check_shards(out: Path, shards: Mapping[str, Mapping[str, str]], io: Io) -> dict[str, str]:
    """{tensor or file: what is wrong with it}."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        found = pool.map(lambda item: dict(_check_shard(out / item[0], item[1], io)), shards.items())
        return {name: problem for problems in found for name, problem in problems.items()}


def _check_shard(path: Path, digests: Mapping[str, str], io: Io) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        yield path.name, f"{path.name}: is missing"
        return
    try:
        source = SafetensorsSource(path)
    except InputError as error:
        yield path.name, str(error)
        return
    with closing(source):
        for name in sorted(digests.keys() ^ source.tensors.keys()):
            yield name, f"{name}: is {'missing from' if name in digests else 'a stranger in'} {path.name}"
        reader, area = SliceReader(source, io), page_memory(room_for(CHUNK_BYTES))
        for name in digests.keys() & source.tensors.keys():
            yield from (
                (name, f"{name} in {path.name}: {wrong}") for wrong in _check_tensor(reader, source.tensors[name], digests[name], area)
            )
        reader.close()


def _check_tensor(reader: SliceReader, info: TensorInfo, right: str, area: memoryview) -> Iterator[str]:
    digest, num_not_finite = blake3(), 0
    num_at_once = CHUNK_BYTES // DTYPE_BYTES[info.dtype]
    for start in range(0, info.num_elements, num_at_once):
        values = reader.read(info.name, start, min(start + num_at_once, info.num_elements), area)
        digest.update(values.view(torch.uint8).numpy().data)
        if info.is_floating and not is_recomputed(info):
            num_not_finite += values.numel() - int(torch.isfinite(values).sum())
    wrong = []
    if info.num_elements == 0:
        wrong.append("is empty")
    if num_not_finite:
        wrong.append(f"{num_not_finite} elements are NaN or infinite")
    if digest.hexdigest() != right:
        wrong.append("its bytes are not those that were written")
    if wrong:
        yield ", ".join(wrong)


def _against_inputs(out: Path, manifest: dict[str, Any], differing: Mapping[str, str], memory_bytes: int, io: Io) -> Verdict:
    """Compute the result again, and say of tensors that differ in what way."""
    recipe = manifest["recipe"]
    verdict = Verdict([], [])
    for role in ("base", "tuned"):
        path = Path(recipe[role]["path"])
        if not path.exists():
            verdict.notes.append(f"the {role} model {path} is no longer there: not compared with it")
        elif content_digest(path) != recipe[role]["digest"]:
            verdict.problems.append(f"the {role} model {path} has changed since the result was made")
    if verdict.notes or verdict.problems:
        return Verdict([*differing.values(), *verdict.problems], verdict.notes)
    formula = Formula(recipe["scale"], recipe["rounding"], recipe.get("seed", 0))
    with closing(open_source(recipe["base"]["path"])) as base, closing(open_source(recipe["tuned"]["path"], base=base)) as tuned:
        plan = make_plan(base, tuned, recipe["dtype"], recipe["max_shard_bytes"])
        for name, noted in _compute_again(plan, base, tuned, formula, memory_bytes, io).items():
            if noted["blake3"] != manifest["tensors"].get(name, {}).get("blake3"):
                verdict.problems.append(f"{name}: the manifest's digest is not that of base - scale * (tuned - base)")
        verdict.problems.extend(_explained(out, manifest, differing, plan, base, tuned, formula))
    return verdict


def _compute_again(plan: Plan, base: TensorSource, tuned: TensorSource, formula: Formula, memory_bytes: int, io: Io) -> Receipt:
    receipts: Receipt = {}
    stream = Stream(plan, base, tuned, formula, memory_bytes, io)
    stream.run(plan.shards, lambda shard: _Nowhere(), lambda shard, receipt: receipts.update(receipt), lambda num_done: None)
    return receipts


class _Nowhere:
    """An output that keeps nothing: only the receipts matter."""

    def write_pages(self, view: memoryview, num_bytes: int, offset: int) -> None:
        pass

    def commit(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def _explained(
    out: Path, manifest: dict[str, Any], differing: Mapping[str, str], plan: Plan, base: TensorSource, tuned: TensorSource, formula: Formula
) -> Iterator[str]:
    for name, problem in differing.items():
        stored = _open_as_planned(out, manifest, plan, name)
        if stored is None:
            yield problem
            continue
        with closing(stored):
            yield f"{problem}: {explain(plan.items[name], stored, base, tuned, formula)}"


def _open_as_planned(out: Path, manifest: dict[str, Any], plan: Plan, name: str) -> SafetensorsSource | None:
    """The file that holds the tensor `name`, or None if it does not, or not in the shape and dtype that it should have."""
    try:
        source = SafetensorsSource(out / manifest["tensors"][name]["file"])
    except (KeyError, InputError):
        return None
    if name in plan.items and source.tensors.get(name) == plan.items[name].info:
        return source
    source.close()
    return None
