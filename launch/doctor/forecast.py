"""What each stage of an experiment still to be run will want of a machine, and whether it has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from launch.doctor.capacity import Capacity, state_of
from launch.doctor.inputs import data_size, model_size
from launch.doctor.machine import Row
from pipeline.config import Cluster, Experiment
from pipeline.needs import DataSize, ModelSize, Needs
from pipeline.plan import Step, make_plan
from pipeline.stages import STAGES, load


class Want(NamedTuple):
    """A step still to be run, and what it wants."""

    step: Step
    needs: Needs

    @property
    def memory_bytes(self) -> int:
        """Of one process."""
        return sum(self.needs.memory.values())


def rows(experiment: Experiment, capacity: Capacity) -> Iterator[Row]:
    """A finding for each kind of stage still to be run, one for the disk, and one for the time."""
    plan = make_plan(experiment)
    pending = list(plan.pending())
    if not pending:
        yield Row("experiment", "ok", f"{plan.run_dir}: all {len(plan.steps)} steps are done")
        return
    model = model_size(experiment.model)
    if isinstance(model, str):
        advice = "fetch the model first, or give a local folder: --set model.path=..."
        yield Row("estimates", "warn", f"none: {model}", advice)
        return
    data = data_size(plan, experiment)
    yield _experiment_row(experiment, model, data)
    wants = list(_wants(pending, model, data, experiment.cluster.ranks))
    yield from _memory_rows(wants, experiment.cluster, capacity)
    yield disk_row(wants, capacity)
    yield _time_row(wants, experiment.cluster, capacity)


def _wants(pending: list[Step], model: ModelSize, data: DataSize, ranks: int) -> Iterator[Want]:
    for step in pending:
        needs = STAGES[step.stage].needs
        if needs is not None:
            yield Want(step, load(needs)(step.section, model, data, ranks))


def _experiment_row(experiment: Experiment, model: ModelSize, data: DataSize) -> Row:
    ranks = experiment.cluster.ranks
    detail = (
        f"{model.num_parameters / 1e6:,.0f}M parameters; {data.num_facts} facts of about"
        f" {data.record_tokens} tokens; {ranks} rank{'s' if ranks > 1 else ''}. Estimates, right within a"
        " factor of two or so (formulas: pipeline/*/*_needs.py)"
    )
    return Row("experiment", "ok", detail)


def _memory_rows(wants: list[Want], cluster: Cluster, capacity: Capacity) -> Iterator[Row]:
    """One row for all steps of a stage that want the same."""
    groups: dict[tuple[Any, ...], list[Want]] = {}
    for want in wants:
        groups.setdefault(
            (want.step.stage, want.memory_bytes, want.needs.flops, want.needs.precision), []
        ).append(want)
    for (stage, needed, *_), group in groups.items():
        limit, whose = _share(stage, cluster, capacity)
        parts = group[0].needs.memory
        # One part is the whole: its name says enough.
        told = ", ".join(f"{part} {size(held)}" if len(parts) > 1 else part for part, held in parts.items())
        detail = f"{size(needed)} {whose} ({told})"
        seconds = _seconds(group[0], cluster, capacity)
        if seconds:
            detail += f"; computes for about {duration(seconds)}{' each' if len(group) > 1 else ''}"
        state = state_of(needed, limit)
        methods = dict.fromkeys(method for want in group for method in want.step.methods)
        name = f"{len(group)} x {stage}" if len(group) > 1 else stage
        yield Row(
            f"{name} ({', '.join(methods)})" if methods else name,
            state,
            detail,
            _advice(group[0], capacity) if state != "ok" else "",
        )


def _share(stage: str, cluster: Cluster, capacity: Capacity) -> tuple[int, str]:
    """Bytes that one process of the stage may use, and whose they are."""
    if STAGES[stage].job in ("ranks", "gpu"):
        limit = capacity.limit(cluster)
        return limit, f"a rank of {size(limit)}"
    return capacity.host_bytes, f"of the {size(capacity.host_bytes)} that are free on the host"


def _advice(want: Want, capacity: Capacity) -> str:
    """Its own settings, and how many ranks there are: that is the machine's side of it."""
    if capacity.own_bytes is None:
        ranks = "fewer ranks, which share this memory (cluster.ranks)"
    elif STAGES[want.step.stage].job == "ranks":
        ranks = "more ranks, which divide optimizer and gradients (cluster.ranks, cluster.nodes)"
    else:
        ranks = "a GPU with more memory"
    return f"less memory: {'; or '.join(filter(None, [want.needs.advice, ranks]))}"


def _seconds(want: Want, cluster: Cluster, capacity: Capacity) -> float:
    """On a cluster a step that is no fine-tuning has one rank."""
    alone = capacity.on_cluster and STAGES[want.step.stage].job != "ranks"
    return want.needs.flops / capacity.rate(want.needs.precision, 1 if alone else cluster.ranks)


def _time_row(wants: list[Want], cluster: Cluster, capacity: Capacity) -> Row:
    if capacity.flops is None:
        return Row("time for this run", "ok", "not estimated: the speed of GPUs that are not here is unknown")
    seconds = sum(_seconds(want, cluster, capacity) for want in wants)
    detail = (
        f"computes for about {duration(seconds)}, one step after another;"
        " to that come the start of each step, and what it writes"
    )
    return Row("time for this run", "ok", detail)


def disk_row(wants: list[Want], capacity: Capacity) -> Row:
    """The results that stay, the most that comes and goes at a time while stages run, and what has to be
    written.
    """
    free = capacity.disk_bytes
    stay, written = sum(want.needs.result for want in wants), sum(want.needs.written for want in wants)
    passing = max((want.needs.passing for want in wants), default=0)
    order = "one by one"
    if capacity.on_cluster:
        passing, order = _side_by_side(wants), "side by side"
    detail = (
        f"{size(stay + passing)} of {size(free)} free: results {size(stay)}, checkpoints of trainings {order}"
        f" {size(passing)}; writes {size(written)} in all, checkpoints (checkpoint_every_steps) included"
    )
    state = state_of(stay + passing, free)
    advice = "" if state == "ok" else "set cluster.runs_dir to a larger disk, or run fewer methods"
    return Row("disk for this run", state, detail, advice)


def _side_by_side(wants: list[Want]) -> int:
    """The largest sum of `passing` over steps none of which needs another.

    Each such step waits for one other at most, the last of those before it: so of each either itself counts,
    or the most of those after it, whichever is more.
    """
    passing = {want.step.id: want.needs.passing for want in wants if want.needs.passing}
    after = dict.fromkeys(passing, 0)
    most = 0
    for want in reversed(wants):
        if want.step.id in after:
            largest = max(passing[want.step.id], after[want.step.id])
            needed = _last_before(want.step, passing)
            if needed is None:
                most += largest
            else:
                after[needed] += largest
    return most


def _last_before(step: Step, among: dict[str, int]) -> str | None:
    """Of the steps `among` that `step` descends from, the last in the plan's order, which `among` keeps."""
    found, waiting = set(), list(step.inputs.values())
    while waiting:
        source = waiting.pop()
        found.add(source.id)
        waiting += source.inputs.values()
    return next((id for id in reversed(among) if id in found), None)


def duration(seconds: float) -> str:
    """A rough time, in the largest unit that fits."""
    for unit_seconds, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit_seconds:
            return f"{seconds / unit_seconds:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


def size(num_bytes: float) -> str:
    """Bytes in decimal units."""
    if num_bytes >= 1e12:
        return f"{num_bytes / 1e12:.1f} TB"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"
