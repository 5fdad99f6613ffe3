"""Verify: read a result again, against its manifest and, where they are still there, against the models it
was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.delta.arithmetic import Formula
from pipeline.delta.check import check_files, check_shards
from pipeline.delta.disk import Io
from pipeline.delta.explain import explain
from pipeline.delta.journal import Journal
from pipeline.delta.making import Receipt
from pipeline.delta.plan import Plan, make_plan
from pipeline.delta.stream import Stream
from pipeline.delta.subtract import ARITHMETIC_VERSION, Progress
from pipeline.errors import InputError
from pipeline.weights.digest import content_digest
from pipeline.weights.open import open_source
from pipeline.weights.safetensors import SafetensorsSource
from pipeline.weights.shard import parse_size
from pipeline.weights.source import TensorSource


class Verdict(NamedTuple):
    """What verifying found."""

    problems: list[str]
    """Each names what differs; empty: the result is what it should be."""
    notes: list[str]
    """Why the result could not be compared with its inputs: these are no longer there, or another version of
    flearn made it.
    """
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
    """Check the result in `out`: every file, every tensor's bytes, and that they are base - scale * (tuned -
    base).

    An unfinished result's finished shards are checked, too. Of a finished one of another version of flearn,
    whose arithmetic or digests may be others, only the bytes are. Raises InputError if `out` is no result of
    `subtract`.
    """
    journal = Journal(out)
    manifest = journal.manifest
    if manifest is None:
        return _verify_unfinished(journal, io)
    num_bytes, shards = manifest["num_bytes"], _tensors_by_file(manifest)

    def report(num_done: int) -> None:
        if progress is not None:
            progress(num_done, 2 * num_bytes)

    problems = [*check_files(out, shards, manifest.get("extras", {})), *_equals_base(manifest)]
    differing = check_shards(out, shards, io, lambda num_read: report(num_bytes * num_read // len(shards)))
    compared = _against_inputs(
        out, manifest, differing, parse_size(memory), io, lambda num_done: report(num_bytes + num_done)
    )
    return Verdict(problems + compared.problems, compared.notes)


def _verify_unfinished(journal: Journal, io: Io) -> Verdict:
    if journal.recipe is None:
        inside = journal.out / "model"  # where a run's `forget` stage has it
        if Journal(inside).manifest is not None:
            raise InputError(f"{journal.out}: holds no result itself; verify {inside}")
        raise InputError(
            f"{journal.out}: holds no result of `flearn delta subtract` (its manifest.json is absent, damaged or another program's)"
        )
    if not _is_of_this_version(journal.recipe):
        again = f"delete {journal.out} and run the command again"
        return Verdict(
            [],
            [],
            f"not finished, and begun by another version of flearn, which this one cannot go on with: {again}",
        )
    shards = {
        file: {name: noted["blake3"] for name, noted in receipt.items()}
        for file, receipt in journal.receipts().items()
    }
    differing = check_shards(journal.out, shards, io, lambda num_read: None)
    done = f"not finished, {len(shards)} shards are done{'' if differing else ' and as they were written'}"
    return Verdict([*differing.values()], [], f"{done}; run the same command again, it goes on from there")


def _is_of_this_version(recipe: dict[str, Any]) -> bool:
    """Whether the recipe's digests mean what this version's do, and its inputs give the same bytes."""
    return bool(recipe.get("version") == ARITHMETIC_VERSION)


def _tensors_by_file(manifest: dict[str, Any]) -> dict[str, dict[str, str]]:
    """{file: {tensor: blake3}}."""
    shards: dict[str, dict[str, str]] = {shard["file"]: {} for shard in manifest["shards"]}
    for name, tensor in manifest["tensors"].items():
        shards[tensor["file"]][name] = tensor["blake3"]
    return shards


def _equals_base(manifest: dict[str, Any]) -> Iterator[str]:
    survival = manifest["survival"]
    if manifest["recipe"].get("undoes"):  # a 16-bit base may well equal the rounded theta'
        return
    if survival["share_changed"] == 0 and survival["delta_norm"] > 0 and manifest["recipe"]["scale"] != 0:
        yield f"the result equals its base: every change was lost in {manifest['dtype']}"


def _against_inputs(
    out: Path,
    manifest: dict[str, Any],
    differing: Mapping[str, str],
    memory_bytes: int,
    io: Io,
    on_progress: Callable[[int], None],
) -> Verdict:
    """Compute the result again, and say of tensors that differ in what way."""
    recipe = manifest["recipe"]
    if not _is_of_this_version(recipe):
        return Verdict([*differing.values()], ["it was made by another version of flearn"])
    verdict = Verdict([], [])
    for role in ("base", "tuned"):
        path = Path(recipe[role]["path"])
        if not path.exists():
            verdict.notes.append(f"the {role} model {path} is not there")
        elif content_digest(path) != recipe[role]["digest"]:
            verdict.problems.append(f"the {role} model {path} has changed since the result was made")
    if verdict.notes or verdict.problems:
        return Verdict([*differing.values(), *verdict.problems], verdict.notes)
    formula = Formula(recipe["scale"], recipe["rounding"], recipe.get("seed", 0))
    with (
        closing(open_source(recipe["base"]["path"])) as base,
        closing(open_source(recipe["tuned"]["path"], base=base)) as tuned,
    ):
        plan = make_plan(base, tuned, recipe["dtype"], recipe["max_shard_bytes"])
        receipts: Receipt = {}
        stream = Stream(plan, base, tuned, formula, memory_bytes, io)
        stream.run(
            plan.shards,
            lambda shard: _Nowhere(),
            lambda shard, receipt: receipts.update(receipt),
            on_progress,
        )
        for name, noted in receipts.items():
            right = manifest["tensors"].get(name, {})
            changed = [
                role
                for role, digest in noted["inputs"].items()
                if digest != right.get("inputs", {}).get(role, digest)
            ]
            verdict.problems.extend(
                f"{name}: the {role} model has changed since the result was made" for role in changed
            )
            if not changed and noted["blake3"] != right.get("blake3"):
                verdict.problems.append(
                    f"{name}: the manifest's digest is not that of base - scale * (tuned - base)"
                )
        verdict.problems.extend(_explained(out, manifest, differing, plan, base, tuned, formula))
    return verdict


class _Nowhere:
    """An output that keeps nothing: only the receipts matter."""

    def write_pages(self, view: memoryview, num_bytes: int, offset: int) -> None:
        pass

    def commit(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def _explained(
    out: Path,
    manifest: dict[str, Any],
    differing: Mapping[str, str],
    plan: Plan,
    base: TensorSource,
    tuned: TensorSource,
    formula: Formula,
) -> Iterator[str]:
    for name, problem in differing.items():
        stored = _open_as_planned(out, manifest, plan, name)
        if stored is None:
            yield problem
            continue
        with closing(stored):
            yield f"{problem}: {explain(plan.items[name], stored, base, tuned, formula)}"


def _open_as_planned(out: Path, manifest: dict[str, Any], plan: Plan, name: str) -> SafetensorsSource | None:
    """The file that holds the tensor `name`, or None if it does not, or not in the shape and dtype that it
    should have.
    """
    try:
        source = SafetensorsSource(out / manifest["tensors"][name]["file"])
    except (KeyError, InputError):
        return None
    if name in plan.items and source.tensors.get(name) == plan.items[name].info:
        return source
    source.close()
    return None
