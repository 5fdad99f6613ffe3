"""report.html: everything in results.json on one self-contained page, for people.

The page loads nothing from elsewhere, and has no scripts. The template escapes all text from data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import cost, figures
from pipeline.report.compare import Scores
from pipeline.report.seeds import over_seeds
from pipeline.report.summary import summarise
from pipeline.report.svg import DARK, LIGHT
from pipeline.report.table import best_values, measured
from pipeline.report.terms import (
    METRICS,
    PROTOCOLS,
    ROW_METRICS,
    STATES,
    Way,
    count,
    look,
    ordered_protocols,
    percent,
    three_digits,
)

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
        "count": count,
        "picture": Markup,
        "settings": _settings_text,
        "duration": cost.duration,
        "size": cost.size,
    }
    environment.globals |= {
        "look": look,
        "METRICS": METRICS,
        "STATES": STATES,
        "LIGHT": LIGHT,
        "DARK": DARK,
        "LINES": figures.LINES,
        "PARTS": figures.PARTS,
        "UPDATES": cost.UPDATES,
    }
    return environment.get_template("template.html.j2").render(**_view(results))


def _view(results: Json) -> Json:
    """What the template shows, worked out."""
    protocols = ordered_protocols([row["protocol"] for row in results["rows"]])
    methods = [entry["method"] for entry in results["methods"]]
    panels = figures.forgetting_curves(results["curves"])
    # Under `probability` the old answer's curve mirrors the new one's: the table's numbers are enough.
    curves = [
        (_way(p), panels[p]) for p in protocols if p in panels and (p != "probability" or len(protocols) == 1)
    ]
    return {
        "results": results,
        "num_seeds": len(results["seeds"]),
        "summary": summarise(results),
        "compared": [(m, look(m).baseline) for m in methods if look(m).baseline in methods],
        "protocols": [_protocol(results, protocol) for protocol in protocols],
        "curves": curves,
        "curve_rows": sorted(
            figures.curve_rows(results["curves"]), key=lambda row: protocols.index(row["protocol"])
        ),
        "cost_panels": figures.cost(results["stages"]),
        "cost_rows": _costs(results),
        "norm_panels": figures.by_layer(results["layers"], figures.NORM),
        "relative_panels": figures.by_layer(results["layers"], figures.RELATIVE_NORM),
        "survival_panels": figures.by_layer(results["layers"], figures.SURVIVAL),
        "all_survives": _all_survives(results["layers"]),
        "step_label": cost.step_label,
        "sample_rows": lambda sample: _sample_rows(sample, methods),
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
    rows = []
    for row in updated:
        cells = [_cell(row, metric, best) | _change(scores, row, metric) for metric in metrics]
        rows.append((row, cells))
    return {
        "id": protocol,
        "way": _way(protocol),
        "metrics": metrics,
        "original": [_cell(original, metric) for metric in metrics],
        "rows": rows,
        "figure": figures.bars(updated, original, metrics),
        "split": _split(results["known"]["rows"], protocol),
    }


def _cell(row: Json | None, metric: str, best: Json | None = None) -> Json:
    """A score as the table shows it."""
    value = row[metric] if row else None
    spread = row["spread"].get(metric) if row and value is not None else None
    is_best = value is not None and best is not None and percent(value) == percent(best[metric])
    return {
        "value": percent(value),
        "spread": percent(spread) if spread is not None else "",
        "is_best": is_best,
        "change": None,
    }


def _change(scores: Scores, row: Json, metric: str) -> Json:
    """How a method's score differs from that of its baseline."""
    change = scores.to_baseline(row["method"], row["protocol"], metric)
    baseline = look(row["method"]).baseline
    if change is None or baseline is None:
        return {}
    is_better = (change.value > 0) == METRICS[metric].higher_is_better
    kind = "noise" if change.is_noise else "better" if is_better else "worse"
    told = {"points": change.points, "kind": kind, "noise": change.noise_points}
    return {"change": told | {"baseline": look(baseline).label}}


def _split(rows: list[Json], protocol: str) -> list[tuple[str, Json, Json]]:
    """For each method, the updated model's scores over known and over unknown facts, if there are both."""
    mine = [row for row in rows if row["protocol"] == protocol and row["state"] == "updated"]
    merged = over_seeds(mine, ("method", "subset"), (*ROW_METRICS, "num_records"))
    by_subset = {(row["subset"], row["method"]): row for row in merged}
    pairs = []
    for method in dict.fromkeys(row["method"] for row in mine):
        known, unknown = by_subset["known", method], by_subset["unknown", method]
        if known["num_records"] and unknown["num_records"]:
            pairs.append((method, known, unknown))
    return pairs


def _all_survives(layers: dict[str, list[Json]]) -> bool:
    """Whether every layer keeps all of what was to be subtracted, as far as the page's digits go."""
    kept = set()
    for rows in layers.values():
        for row in rows:
            kept |= {percent(row[part]["projection"]) for part, _, _ in figures.PARTS}
    return kept - {percent(None)} == {percent(1)}


def _sample_rows(sample: Json, methods: list[str]) -> list[tuple[str, list[Json | None]]]:
    """What was said about one record: a row per state after the original, with an answer per method, or None
    where it has no such state.
    """
    said = {(answer["state"], answer["method"]): answer for answer in sample["said"]}
    states = [state for state in STATES if any(state == key[0] for key in said)]
    return [(state, [said.get((state, method)) for method in methods]) for state in states]


def _costs(results: Json) -> list[Json]:
    """Each method's training time, and its ratio to its baseline's."""
    rows = []
    for entry in results["methods"]:
        parts = cost.update_seconds(results, entry["method"])
        total = sum(parts.values())
        baseline = look(entry["method"]).baseline
        reference = sum(cost.update_seconds(results, baseline).values()) if baseline else 0
        ratio = f"{total / reference:.2f} ×" if reference else "–"
        shown = {stage: parts.get(stage) for stage in cost.UPDATES}
        rows.append({"method": entry["method"], "parts": shown, "total": total, "ratio": ratio})
    return rows


def _way(protocol: str) -> Way:
    return PROTOCOLS.get(protocol, Way(protocol, protocol, "", "", {}))


def _model(settings: list[Json]) -> str:
    """The base model in a few words."""
    model: Json = next((e["section"]["model"] for e in settings if "model" in e["section"]), {})
    tiny = model.get("tiny")
    if tiny:
        size = f"{tiny['num_layers']} layers, hidden size {tiny['hidden_size']}"
        return f"tiny {tiny['architecture']} made on the spot ({size})"
    return str(model.get("path") or "–")


def _facts_path(settings: list[Json]) -> str:
    paths = next((e["section"]["facts"]["path"] for e in settings if "facts" in e["section"]), "–")
    return ", ".join(Path(path).name for path in ([paths] if isinstance(paths, str) else paths))


def _settings_text(section: Json) -> str:
    return json.dumps(section, indent=2, ensure_ascii=False)
