"""report.html: everything in results.json on one self-contained page, for people.

The page loads nothing: no scripts, fonts or pictures from elsewhere. All text from data is escaped by the
template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import cost, figures
from pipeline.report.compare import Scores
from pipeline.report.names import (
    HUES,
    METRICS,
    PROTOCOLS,
    STATES,
    Way,
    look,
    ordered_protocols,
    percent,
    three_digits,
)
from pipeline.report.summary import summarise
from pipeline.report.table import best_values, measured

Json = dict[str, Any]


def render(results: Json) -> str:
    """The page as HTML text; the same results give the same bytes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "three_digits": three_digits,
        "svg": Markup,
        "settings": _settings_text,
    }
    environment.filters |= {"duration": cost.duration, "size": cost.size}
    environment.globals |= {
        "look": look,
        "METRICS": METRICS,
        "STATES": STATES,
        "HUES": HUES,
        "LINES": figures.LINES,
        "PARTS": figures.PARTS,
    }
    return environment.get_template("template.html.j2").render(**_view(results))


def _view(results: Json) -> Json:
    """What the template shows, worked out."""
    protocols = ordered_protocols([row["protocol"] for row in results["rows"]])
    curves = figures.forgetting_curves(results["curves"])
    return {
        "results": results,
        "summary": summarise(results),
        "protocols": [_protocol(results, protocol) for protocol in protocols],
        # Under `probability` the old answer's curve is the new one's mirror image: numbers in the table are
        # enough.
        "curves": [
            (_way(p), curves[p])
            for p in protocols
            if p in curves and (p != "probability" or len(protocols) == 1)
        ],
        "curve_rows": sorted(results["curves"], key=lambda row: protocols.index(row["protocol"])),
        "cost_panels": figures.cost(results["stages"]),
        "cost_rows": _costs(results),
        "norm_panels": figures.by_layer(results["layers"], figures.NORM),
        "relative_panels": figures.by_layer(results["layers"], figures.RELATIVE_NORM),
        "survival_panels": figures.by_layer(results["layers"], figures.SURVIVAL),
        "all_survives": _all_survives(results["layers"]),
        "step_label": cost.step_label,
        "sample_rows": lambda sample: _sample_rows(sample, [entry["method"] for entry in results["methods"]]),
        "way": _way,
        "model": _model(results["settings"]),
        "facts_path": _facts_path(results["settings"]),
    }


def _protocol(results: Json, protocol: str) -> Json:
    """One protocol's section: its table, its figure, and the scores split by what the original model knew."""
    metrics = measured([row for row in results["rows"] if row["protocol"] == protocol])
    scores = Scores(results)
    entries = results["methods"]
    updated = [row for entry in entries if (row := scores.row(entry["method"], protocol, "updated"))]
    best = best_values(updated, metrics)
    original = scores.row(entries[0]["method"], protocol, "original")
    return {
        "id": protocol,
        "way": _way(protocol),
        "metrics": metrics,
        "original": [_cell(original, metric) for metric in metrics],
        "rows": [
            (row, [_cell(row, metric, best) | _change(scores, row, metric) for metric in metrics])
            for row in updated
        ],
        "figure": figures.bars(results["rows"], protocol, metrics),
        "split": _split(results["known"]["rows"], protocol),
    }


def _cell(row: Json | None, metric: str, best: Json | None = None) -> Json:
    """A score as the table shows it."""
    value = row[metric] if row else None
    stderr = row["stderr"].get(metric) if row and value is not None else None
    is_best = value is not None and best is not None and percent(value) == percent(best[metric])
    return {
        "value": percent(value),
        "stderr": percent(stderr) if stderr is not None else "",
        "is_best": is_best,
        "change": None,
    }


def _change(scores: Scores, row: Json, metric: str) -> Json:
    """How an F-Learning method's score differs from that of the same training without forgetting."""
    change = scores.to_baseline(row["method"], row["protocol"], metric)
    baseline = look(row["method"]).baseline
    if change is None or baseline is None:
        return {}
    is_better = (change.value > 0) == METRICS[metric].higher_is_better
    kind = "noise" if change.is_noise else "better" if is_better else "worse"
    return {
        "change": {
            "points": change.points,
            "kind": kind,
            "baseline": look(baseline).label,
            "noise": change.noise_points,
        }
    }


def _split(rows: list[Json], protocol: str) -> list[tuple[str, Json, Json]]:
    """For each method, the updated model's scores over the known and over the unknown facts; none where one
    of the two is empty.
    """
    mine = [row for row in rows if row["protocol"] == protocol and row["state"] == "updated"]
    subsets = {
        subset: {row["method"]: row for row in mine if row["subset"] == subset}
        for subset in ("known", "unknown")
    }
    pairs = [(method, row, subsets["unknown"][method]) for method, row in subsets["known"].items()]
    return [pair for pair in pairs if pair[1]["num_records"] and pair[2]["num_records"]]


def _all_survives(layers: dict[str, list[Json]]) -> bool:
    """Whether every layer keeps, as far as the page's digits go, all of what was to be subtracted from it (as
    in float32).
    """
    kept = {
        row[block]["projection"] for rows in layers.values() for row in rows for block, _, _ in figures.PARTS
    }
    return {percent(share) for share in kept if share is not None} == {percent(1)}


def _sample_rows(sample: Json, methods: list[str]) -> list[tuple[str, list[Json | None]]]:
    """What was said about one record: a row per state after the original, with an answer per method (None: no
    such state).
    """
    said = {(answer["state"], answer["method"]): answer for answer in sample["said"]}
    states = [state for state in STATES if any(state == key[0] for key in said)]
    return [(state, [said.get((state, method)) for method in methods]) for state in states]


def _costs(results: Json) -> list[Json]:
    """Each method's training time, and its ratio to the same training without forgetting."""
    rows = []
    for entry in results["methods"]:
        method = entry["method"]
        parts = {stage: _seconds(results["stages"], method, stage) for stage in cost.TRAINING}
        total = cost.training_seconds(results["stages"], method)
        baseline = look(method).baseline
        reference = cost.training_seconds(results["stages"], baseline) if baseline else 0
        rows.append(
            {
                "method": method,
                "parts": parts,
                "total": total,
                "ratio": f"{total / reference:.2f} ×" if reference else "–",
            }
        )
    return rows


def _seconds(stages: list[Json], method: str, stage: str) -> float | None:
    seconds = [step["seconds"] for step in stages if step["stage"] == stage and method in step["methods"]]
    return sum(seconds) if seconds else None


def _way(protocol: str) -> Way:
    return PROTOCOLS.get(protocol, Way(protocol, protocol, "", "", {}))


def _model(settings: list[Json]) -> str:
    """The base model in a few words."""
    model: Json = next((entry["section"]["model"] for entry in settings if entry["stage"] == "model"), {})
    tiny = model.get("tiny")
    if tiny:
        return f"tiny {tiny['architecture']} made on the spot ({tiny['num_layers']} layers, hidden size {tiny['hidden_size']})"
    return str(model.get("path") or "–")


def _facts_path(settings: list[Json]) -> str:
    paths = next((entry["section"]["facts"]["path"] for entry in settings if entry["stage"] == "facts"), "–")
    return ", ".join(Path(path).name for path in ([paths] if isinstance(paths, str) else paths))


def _settings_text(section: Json) -> str:
    return json.dumps(section, indent=2, ensure_ascii=False)
