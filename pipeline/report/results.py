"""What a run measured, as one JSON object: gathered from its steps' manifests, and all that the page and the
table know.

`rows` is the contract that scripts are written against: one row per method, protocol and state, scores as
fractions of 1, null where there is none. The original model's rows are repeated for every method, so that
each method's rows stand alone.

`survival` and `layers` have an entry for every method that forgets: the subtraction's figures over the whole
model, and by layer `{"layer": 0, "attention": {...}, "mlp": {...}, "matrices": {name: L2 norm of its
change}}`. Of a layer's attention and of its MLP: `delta_norm` is the L2 norm of what fine-tuning on the old
facts changed, before it is scaled; `relative_norm` that norm divided by the norm of the original weights that
were fine-tuned (an adapter's: of the matrices it changes); `share_changed` the share of those weights whose
stored value the subtraction changed; `projection` the share of the intended change that is stored, along its
own direction. Fractions of 1 (`projection` may pass it, by rounding), null where nothing was fine-tuned or
nothing was to change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.artifact import Artifact
from pipeline.report import findings, samples
from pipeline.report.names import STATES
from pipeline.report.paired import compare
from pipeline.report.records import read

ROW_METRICS = ("reliability", "generality", "locality", "leakage", "portability", "old_reliability")
LAYER_BLOCKS = ("attention", "mlp")
LAYER_FIGURES = ("delta_norm", "relative_norm", "share_changed", "projection")
PACKAGES = ("flearn", "torch", "deepspeed", "transformers", "peft")

Json = dict[str, Any]


def build(methods: list[Json], name: str, seed: int, inputs: dict[str, Artifact]) -> Json:
    """The results of one run.

    `methods` is the report step's own list: method, scale, its evaluations' step ids by state, its forget
    step's id. `inputs` maps every step's id to its artifact. Raises InputError for a step that has not
    finished.
    """
    evaluations = {
        m["method"]: {s: inputs[m["evaluations"][s]].result for s in STATES if s in m["evaluations"]}
        for m in methods
    }
    sampled = samples.choose(next(iter(evaluations.values()))["original"]["num_records"])
    records = {step: read(inputs[step], sampled) for m in methods for step in m["evaluations"].values()}
    forgets = {m["method"]: inputs[m["forget"]].result for m in methods if m["forget"] is not None}
    users = _users(methods, inputs)
    results: Json = {
        "name": name,
        "seed": seed,
        "methods": [{"method": m["method"], "scale": m["scale"]} for m in methods],
        "rows": _rows(methods, evaluations, seed),
        "comparisons": compare(methods, records),
        "curves": _curves(evaluations),
        "known": _known(evaluations),
        "survival": {method: facts["survival"] for method, facts in forgets.items()},
        "layers": {method: _layers(facts["layers"]) for method, facts in forgets.items()},
        "stages": _stages(inputs, methods, users),
        "data": _data(inputs),
        "samples": samples.show(sampled, methods, records),
        "settings": _settings(inputs, users),
        "versions": _versions(),
        "finished": max((source.manifest["finished"] for source in inputs.values()), default=None),
    }
    results["warnings"] = findings.find(results) + findings.from_stages(results["stages"], inputs)
    return _without_nan(results)


def _rows(methods: list[Json], evaluations: dict[str, dict[str, Json]], seed: int) -> list[Json]:
    return [
        {"method": m["method"], "protocol": protocol, "state": state}
        | {metric: scores.get(metric) for metric in ROW_METRICS}
        | {"num_records": facts["num_records"], "seed": seed, "scale": m["scale"]}
        | {"stderr": scores["stderr"], "counts": scores["counts"], "other": _other(scores)}
        for m in methods
        for state, facts in evaluations[m["method"]].items()
        if state != "tuned"
        for protocol, scores in facts["protocols"].items()
    ]


def _other(scores: Json) -> Json:
    """A protocol's own scores beside the common ones (containment, ROME's S)."""
    return {name: value for name, value in scores.items() if name not in (*ROW_METRICS, "stderr", "counts")}


def _curves(evaluations: dict[str, dict[str, Json]]) -> list[Json]:
    """How the old and the new answer fare from state to state, FT-old included; one row per method, protocol
    and state.
    """
    return [
        {
            "method": method,
            "protocol": protocol,
            "state": state,
            "new_answer": scores.get("reliability"),
            "old_answer": scores.get("old_reliability"),
            "locality": scores.get("locality"),
        }
        for method, states in evaluations.items()
        for state, facts in states.items()
        for protocol, scores in facts["protocols"].items()
    ]


def _known(evaluations: dict[str, dict[str, Json]]) -> Json:
    """The scores apart for the facts whose old answer the original model knew, and for the others."""
    rows = [
        {"method": method, "protocol": protocol, "state": state, "subset": subset}
        | {metric: scores.get(metric) for metric in ROW_METRICS}
        | {"num_records": facts[subset]["num_known" if subset == "known" else "num_records"]}
        for method, states in evaluations.items()
        for state, facts in states.items()
        for subset in ("known", "unknown")
        for protocol, scores in facts[subset]["protocols"].items()
    ]
    known = next(iter(evaluations.values()))["original"]["known"]
    return {"num_known": known["num_known"], "num_records": known["num_records"], "rows": rows}


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


def _users(methods: list[Json], inputs: dict[str, Artifact]) -> dict[str, list[str]]:
    """By step id, the methods that need the step; none for what only makes and scores the original model,
    which all share.
    """
    shared = _ancestors([m["evaluations"]["original"] for m in methods], inputs)
    needed = {m["method"]: _ancestors(m["evaluations"].values(), inputs) - shared for m in methods}
    return {step: [method for method, steps in needed.items() if step in steps] for step in inputs}


def _ancestors(steps: Iterable[str], inputs: dict[str, Artifact]) -> set[str]:
    """`steps`, and all that they were made from."""
    found: set[str] = set()
    waiting = list(steps)
    while waiting:
        step = waiting.pop()
        if step not in found:
            found.add(step)
            waiting += inputs[step].manifest["inputs"].values()
    return found


def _stages(inputs: dict[str, Artifact], methods: list[Json], users: dict[str, list[str]]) -> list[Json]:
    """What each step cost. `state` says which state of the model an evaluation looked at."""
    states = {step: state for m in methods for state, step in m["evaluations"].items()}
    return [
        {"id": step, "stage": source.manifest["stage"], "methods": users[step], "state": states.get(step)}
        | {
            key: source.manifest[key]
            for key in ("seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "num_ranks", "device")
        }
        for step, source in inputs.items()
    ]


def _data(inputs: dict[str, Artifact]) -> Json:
    """What the facts stage read, kept and dropped."""
    facts = next(source.result for source in inputs.values() if source.manifest["stage"] == "facts")
    return {key: facts[key] for key in ("format", "num_read", "num_facts", "dropped")}


def _settings(inputs: dict[str, Artifact], users: dict[str, list[str]]) -> list[Json]:
    """Every step's own settings; steps of the same stage and settings share an entry."""
    entries: list[Json] = []
    for step, source in inputs.items():
        stage, section, methods = source.manifest["stage"], source.manifest["section"], users[step]
        entry = next((e for e in entries if e["stage"] == stage and e["section"] == section), None)
        if entry is None:
            entries.append({"stage": stage, "methods": list(methods), "section": section})
        else:
            entry["methods"] += [method for method in methods if method not in entry["methods"]]
    return entries


def _versions() -> dict[str, str | None]:
    return {package: _version(package) for package in PACKAGES}


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
