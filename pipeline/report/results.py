"""What a run measured, as one JSON object: all that the page and the table know.

`rows` is the contract that scripts are written against: one row per method, protocol, state and seed. Scores
are fractions of 1, null where there is none. The original model's rows are repeated for every method, so
that each method's rows stand alone.

`summary` has a row per method, protocol and state where there are several seeds: of each score the `mean`
over seeds and the standard `deviation` (n - 1). With one seed it is empty, and `seed` is that seed.

`comparisons` pairs models of the same seed, record by record: `difference` is the mean over records, `stderr`
its standard error. `known` counts the facts that the original model knew. These counts, `survival` and
`layers` are means over seeds; `samples` are those of the first seed.

`survival` and `layers` have an entry for every method that forgets: the subtraction's figures over the whole
model, and by layer `{"layer": 0, "attention": {...}, "mlp": {...}, "matrices": {name: L2 norm of its
change}}`. Of a layer's attention and of its MLP:

    delta_norm      L2 norm of what fine-tuning on the old facts changed, before it is scaled
    relative_norm   that norm divided by the norm of the original weights that were fine-tuned (an adapter's:
                    of the matrices it changes)
    share_changed   share of those weights whose stored value the subtraction changed
    projection      share of the intended change that is stored, along its own direction

Fractions of 1 (`projection` may pass it, by rounding), null where nothing was fine-tuned or nothing was to
change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.artifact import Artifact
from pipeline.report import findings, samples
from pipeline.report.columns import Records, read
from pipeline.report.paired import compare
from pipeline.report.seeds import average, over_seeds
from pipeline.report.terms import ROW_METRICS, STATES

LAYER_BLOCKS = ("attention", "mlp")
LAYER_FIGURES = ("delta_norm", "relative_norm", "share_changed", "projection")
PACKAGES = ("flearn", "torch", "deepspeed", "transformers", "peft")

Json = dict[str, Any]


def build(section: Json, inputs: dict[str, Artifact]) -> Json:
    """The results of one run; `inputs` maps every step's id to its artifact.

    `section` is the report step's own: name, seeds, the facts step's id, and an update for each method and
    seed: its scale, its evaluations' step ids by state, and its subtraction's step id. Raises InputError for
    a step that has not finished.
    """
    updates, seeds = section["updates"], section["seeds"]
    sampled = samples.choose(_evaluation(updates[0], "original", inputs)["num_records"])
    records: dict[str, Records] = {}
    for update in updates:
        for step in update["evaluations"].values():
            records[step] = records.get(step) or read(inputs[step], sampled)
    rows = list(_rows(updates, inputs))
    survival, layers = _subtractions(updates, inputs)
    stages = _stages(updates, seeds, inputs)
    facts = inputs[section["facts"]].result
    results: Json = {
        "name": section["name"],
        "seed": seeds[0] if len(seeds) == 1 else None,
        "seeds": seeds,
        "methods": [
            {"method": update["method"], "scale": update["scale"]}
            for update in updates
            if update["seed"] == seeds[0]
        ],
        "rows": rows,
        "summary": _summary(rows) if len(seeds) > 1 else [],
        "comparisons": compare(updates, records),
        "curves": list(_curves(updates, inputs)),
        "known": _known(updates, inputs),
        "survival": survival,
        "layers": layers,
        "stages": stages,
        "data": {key: facts[key] for key in ("format", "num_read", "num_facts", "dropped")},
        "samples": samples.show(sampled, [u for u in updates if u["seed"] == seeds[0]], records),
        "settings": _settings(stages, inputs),
        "versions": {package: _version(package) for package in PACKAGES},
        "finished": max((source.manifest["finished"] for source in inputs.values()), default=None),
    }
    results["warnings"] = findings.find(results) + findings.from_stages(stages, inputs)
    return _without_nan(results)


def _evaluation(update: Json, state: str, inputs: dict[str, Artifact]) -> Json:
    """What was measured of one state of a method's model."""
    return inputs[update["evaluations"][state]].result


def _measured(updates: list[Json], inputs: dict[str, Artifact]) -> Iterator[tuple[Json, str, Json]]:
    """Each method's states, in the order in which its model passes through them: update, state, result."""
    for update in updates:
        for state in STATES:
            if state in update["evaluations"]:
                yield update, state, _evaluation(update, state, inputs)


def _rows(updates: list[Json], inputs: dict[str, Artifact]) -> Iterator[Json]:
    for update, state, result in _measured(updates, inputs):
        if state == "tuned":  # no model that anyone would use: the curves have it
            continue
        for protocol, scores in result["protocols"].items():
            labels = {"method": update["method"], "protocol": protocol, "state": state}
            run = {"num_records": result["num_records"], "seed": update["seed"], "scale": update["scale"]}
            metrics = {metric: scores.get(metric) for metric in ROW_METRICS}
            errors = {"stderr": scores["stderr"], "counts": scores["counts"], "other": _other(scores)}
            yield labels | metrics | run | errors


def _summary(rows: list[Json]) -> list[Json]:
    """The rows over seeds."""
    return [
        {key: row[key] for key in ("method", "protocol", "state", "scale", "num_seeds")}
        | {"mean": {metric: row[metric] for metric in ROW_METRICS}, "deviation": row["deviation"]}
        for row in over_seeds(rows, ("method", "protocol", "state"), ROW_METRICS)
    ]


def _other(scores: Json) -> Json:
    """A protocol's own scores beside the common ones (containment, ROME's S)."""
    return {name: value for name, value in scores.items() if name not in (*ROW_METRICS, "stderr", "counts")}


def _curves(updates: list[Json], inputs: dict[str, Artifact]) -> Iterator[Json]:
    """How the old and the new answer fare from state to state, FT-old included."""
    for update, state, result in _measured(updates, inputs):
        for protocol, scores in result["protocols"].items():
            yield {
                "method": update["method"],
                "seed": update["seed"],
                "protocol": protocol,
                "state": state,
                "new_answer": scores.get("reliability"),
                "old_answer": scores.get("old_reliability"),
                "locality": scores.get("locality"),
            }


def _known(updates: list[Json], inputs: dict[str, Artifact]) -> Json:
    """The scores apart for the facts whose old answer the original model knew, and for the others."""
    rows = []
    for update, state, result in _measured(updates, inputs):
        for subset, count in (("known", "num_known"), ("unknown", "num_records")):
            for protocol, scores in result[subset]["protocols"].items():
                labels = {"method": update["method"], "seed": update["seed"], "protocol": protocol}
                metrics = {metric: scores.get(metric) for metric in ROW_METRICS}
                rows.append(
                    labels
                    | {"state": state, "subset": subset}
                    | metrics
                    | {"num_records": result[subset][count]}
                )
    originals = {update["seed"]: _evaluation(update, "original", inputs)["known"] for update in updates}
    counts = [{key: known[key] for key in ("num_known", "num_records")} for known in originals.values()]
    return average(counts) | {"rows": rows}


def _subtractions(updates: list[Json], inputs: dict[str, Artifact]) -> tuple[Json, Json]:
    """Survival and layers by method, for those that forget."""
    results: dict[str, list[Json]] = {}
    for update in updates:
        if update["subtraction"] is not None:
            results.setdefault(update["method"], []).append(inputs[update["subtraction"]].result)
    survival = {method: average([one["survival"] for one in found]) for method, found in results.items()}
    layers = {method: average([_layers(one["layers"]) for one in found]) for method, found in results.items()}
    return survival, layers


def _layers(rows: list[Json]) -> list[Json]:
    """What fine-tuning on the old facts changed and what of it is stored, by layer: of attention, of the MLP,
    and each matrix' norm.
    """
    return [
        {"layer": row["layer"]}
        | {
            block: {figure: row.get(block, {}).get(figure) for figure in LAYER_FIGURES}
            for block in LAYER_BLOCKS
        }
        | {"matrices": row["matrices"]}
        for row in rows
    ]


def _ancestors(steps: Iterable[str], inputs: dict[str, Artifact]) -> set[str]:
    """`steps`, and all of this run that they were made from."""
    found: set[str] = set()
    waiting = list(steps)
    while waiting:
        step = waiting.pop()
        if step in inputs and step not in found:
            found.add(step)
            waiting += inputs[step].manifest["inputs"].values()
    return found


def _stages(updates: list[Json], seeds: list[int], inputs: dict[str, Artifact]) -> list[Json]:
    """What each step cost, and what it was for.

    `methods` need the step: none where all share it, as they do what makes and scores the original model.
    `seeds` likewise, and none with one seed. `state` says which state of the model an evaluation looked at.
    """
    original = _ancestors([update["evaluations"]["original"] for update in updates], inputs)
    methods: dict[str, list[str]] = {step: [] for step in inputs}
    users: dict[str, list[int]] = {step: [] for step in inputs}
    states: dict[str, str] = {}
    for update in updates:
        states |= {step: state for state, step in update["evaluations"].items()}
        for step in _ancestors(update["evaluations"].values(), inputs):
            if step not in original and update["method"] not in methods[step]:
                methods[step].append(update["method"])
            if update["seed"] not in users[step]:
                users[step].append(update["seed"])
    costs = ("seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "num_ranks", "device")
    return [
        {
            "id": step,
            "stage": source.manifest["stage"],
            "methods": methods[step],
            "seeds": users[step] if len(users[step]) < len(seeds) else [],
            "state": states.get(step),
        }
        | {key: source.manifest[key] for key in costs}
        for step, source in inputs.items()
    ]


def _settings(stages: list[Json], inputs: dict[str, Artifact]) -> list[Json]:
    """Every step's own settings; steps of the same stage that differ in their seed at most share an entry."""
    entries: list[Json] = []
    for row in stages:
        section = dict(inputs[row["id"]].manifest["section"])
        seed = section.pop("seed", None)
        twins = (e for e in entries if e["stage"] == row["stage"] and e["section"] == section)
        entry = next(twins, None)
        if entry is None:
            entry = {"stage": row["stage"], "methods": [], "section": section, "seeds": []}
            entries.append(entry)
        entry["methods"] += [method for method in row["methods"] if method not in entry["methods"]]
        entry["seeds"] += [] if seed is None or seed in entry["seeds"] else [seed]
    for entry in entries:
        seeds = entry.pop("seeds")
        if seeds:
            entry["section"] |= {"seed": seeds[0] if len(seeds) == 1 else seeds}
    return entries


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN and no infinity: a score that is not a number is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
