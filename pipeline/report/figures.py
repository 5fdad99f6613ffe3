"""The report's figures, from rows of results.json: each a picture, or panels of pictures.

Colours belong to methods and are the same in every figure. Methods that forget are filled, others are hollow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.report.cost import duration, shown_steps, size
from pipeline.report.seeds import over_seeds
from pipeline.report.svg import LIGHT, picture
from pipeline.report.terms import METRICS, STATES, look, short

Json = dict[str, Any]


class Panel(NamedTuple):
    """One picture with its title, ready for the page."""

    title: str
    picture: str


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f}%"


def _fill(method: str) -> dict[str, Any]:
    """Bars of a method: its colour, filled or hollow."""
    colour = LIGHT.hues[look(method).hue]
    return {"facecolor": colour if look(method).is_filled else LIGHT.page, "edgecolor": colour}


def _percent_axis(axes: Any) -> None:
    axes.set_ylim(-4, 104)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.grid(axis="x", visible=False)


LINES = (
    ("new_answer", "new answer", {"linestyle": "-", "marker": "o"}),
    ("old_answer", "old answer", {"linestyle": "--", "marker": "s"}),
    ("locality", "locality", {"linestyle": ":", "marker": "^"}),
)
CURVES = tuple(key for key, _, _ in LINES)
"""The figures of a row of results.json's `curves`."""


def curve_rows(curves: list[Json]) -> list[Json]:
    """Rows of `curves`, several seeds as one: their means, and `deviation`."""
    return over_seeds(curves, ("method", "protocol", "state"), CURVES)


def forgetting_curves(curves: list[Json]) -> dict[str, list[Panel]]:
    """By protocol, a panel per method that forgets: its answers and locality from state to state."""
    rows = curve_rows(curves)
    panels: dict[str, list[Panel]] = {}
    for row in rows:
        if row["state"] == "forgotten":
            key = row["method"], row["protocol"]
            mine = [one for one in rows if (one["method"], one["protocol"]) == key]
            panels.setdefault(row["protocol"], []).append(_curve(*key, mine))
    return panels


def _curve(method: str, protocol: str, rows: list[Json]) -> Panel:
    def paint(axes: Any) -> None:
        colours = {"new_answer": LIGHT.hues[look(method).hue], "old_answer": LIGHT.ink}
        for key, _, style in LINES:
            colour = colours.get(key, LIGHT.muted)
            points = [(x, row) for x, row in enumerate(rows) if row[key] is not None]
            if points:
                axes.errorbar(
                    [x for x, _ in points],
                    [100 * row[key] for _, row in points],
                    yerr=_deviations([row["deviation"][key] for _, row in points]),
                    color=colour,
                    ecolor=colour,
                    elinewidth=1,
                    markerfacecolor=colour if key == "new_answer" else LIGHT.page,
                    **style,
                )
        axes.set_xticks(range(len(rows)), [STATES[row["state"]] for row in rows])
        axes.set_xlim(-0.25, len(rows) - 0.75)
        _percent_axis(axes)

    told = []
    for row in rows:
        values = ", ".join(f"{name} {_percent(row[key])}" for key, name, _ in LINES)
        told.append(f"{STATES[row['state']]}: {values}")
    label = f"{look(method).label}, {short(protocol)}. {'; '.join(told)}."
    return Panel(look(method).label, picture(3.6, 2.15, label, paint))


def _deviations(values: list[float | None]) -> list[float] | None:
    """Whiskers in points; none with one seed."""
    present = [100 * value for value in values if value is not None]
    return present if len(present) == len(values) else None


def bars(updated: list[Json], original: Json | None, metrics: list[str]) -> str:
    """The updated models' scores under one protocol: a group per metric, a bar per method.

    Rows are those of `compare.Scores`. Whiskers are two standard errors over records, or one standard
    deviation over seeds.
    """
    width = 0.8 / max(len(updated), 1)

    def paint(axes: Any) -> None:
        whiskers = {"ecolor": LIGHT.ink, "elinewidth": 1}
        for i, row in enumerate(updated):
            for x, metric in enumerate(metrics):
                if row[metric] is not None:
                    axes.bar(
                        x - 0.4 + (i + 0.5) * width,
                        100 * row[metric],
                        0.8 * width,
                        yerr=100 * _whisker(row, metric),
                        error_kw=whiskers,
                        linewidth=1.4,
                        **_fill(row["method"]),
                    )
        line = {"color": LIGHT.ink, "linewidth": 1.4, "linestyle": (0, (2, 1.5))}
        for x, metric in enumerate(metrics):
            if original and original[metric] is not None:
                axes.hlines(100 * original[metric], x - 0.45, x + 0.45, **line)
        axes.set_xticks(range(len(metrics)), [_directed(metric) for metric in metrics])
        _percent_axis(axes)

    told = []
    for row in updated:
        scores = ", ".join(f"{metric} {_percent(row[metric])}" for metric in metrics)
        told.append(f"{look(row['method']).label}: {scores}")
    return picture(7.6, 2.3, f"Scores after the update. {'; '.join(told)}.", paint)


def _whisker(row: Json, metric: str) -> float:
    spread: float = row["spread"].get(metric) or 0.0
    return spread if row["num_seeds"] > 1 else 2 * spread


def _directed(metric: str) -> str:
    return f"{METRICS[metric].label} {'↑' if METRICS[metric].higher_is_better else '↓'}"


def cost(stages: list[Json]) -> list[Panel]:
    """Seconds and peak memory of every step; evaluations are taken together."""
    steps = shown_steps(stages)
    return [
        _horizontal("Time", "seconds", steps, duration),
        _horizontal("Peak memory", "peak_memory_bytes", steps, size),
    ]


def _horizontal(title: str, key: str, steps: list[Json], tell: Callable[[Any], str]) -> Panel:
    values = [step[key] for step in steps]

    def paint(axes: Any) -> None:
        shared = {"facecolor": LIGHT.muted, "edgecolor": LIGHT.muted}
        note = {"va": "center", "fontsize": 8, "color": LIGHT.muted}
        for y, (step, value) in enumerate(zip(steps, values, strict=True)):
            fill = _fill(step["methods"][0]) if len(step["methods"]) == 1 else shared
            axes.barh(y, value, 0.62, linewidth=1.2, **fill)
            axes.annotate(tell(value), (value, y), xytext=(4, 0), textcoords="offset points", **note)
        axes.set_yticks(range(len(steps)), [step["label"] for step in steps])
        axes.set_ylim(len(steps) - 0.5, -0.5)
        axes.set_xlim(0, 1.3 * max(values, default=1) or 1)
        axes.set_xticks([])
        axes.grid(visible=False)

    told = "; ".join(f"{step['label']} {tell(value)}" for step, value in zip(steps, values, strict=True))
    return Panel(title, picture(5.2, 0.5 + 0.24 * len(steps), f"{title} by step. {told}.", paint))


class Quantity(NamedTuple):
    """A figure of results.json's `layers`, drawn as `factor` times its value on an axis that reaches
    `least_top` at least.
    """

    figure: str
    told: str
    """What it shows of a method, for those who cannot see the picture."""
    factor: float
    least_top: float


NORM = Quantity("delta_norm", "Norm of the task vector of {}", 1, 0)
RELATIVE_NORM = Quantity(
    "relative_norm", "Norm of the task vector of {}, in % of the original weights' norm", 100, 0
)
SURVIVAL = Quantity(
    "projection", "Share of the intended change of {} that the stored weights keep, in %", 100, 100
)

PARTS = (
    ("mlp", "MLP", {"linestyle": "-", "marker": "o"}),
    ("attention", "attention", {"linestyle": "--", "marker": "s"}),
)

Lines = dict[str, dict[int, float]]
"""By part (`PARTS`), its value in each layer that has one."""


def by_layer(layers: dict[str, list[Json]], quantity: Quantity) -> list[Panel]:
    """A quantity of the task vectors by layer, attention against MLP, on one scale (`NORM`: the paper's
    Figures 4 and 5).

    Methods that subtract the same vector have the same norms, and share a panel.
    """
    lines = {method: _lines(rows, quantity) for method, rows in layers.items()}
    shared: dict[str, list[str]] = {}
    highest = quantity.least_top
    for method, parts in lines.items():
        if any(parts.values()):
            shared.setdefault(repr(parts), []).append(method)
        for line in parts.values():
            highest = max([highest, *line.values()])
    top = 1.1 * highest or 1
    return [_layer_panel(methods, lines[methods[0]], quantity, top) for methods in shared.values()]


def _lines(rows: list[Json], quantity: Quantity) -> Lines:
    lines: Lines = {}
    for part, _, _ in PARTS:
        values = {row["layer"]: row[part][quantity.figure] for row in rows}
        lines[part] = {layer: quantity.factor * x for layer, x in values.items() if x is not None}
    return lines


def _layer_panel(methods: list[str], lines: Lines, quantity: Quantity, top: float) -> Panel:
    def paint(axes: Any) -> None:
        colour = LIGHT.hues[look(methods[0]).hue]
        for part, _, style in PARTS:
            if line := lines[part]:
                axes.plot(
                    list(line),
                    list(line.values()),
                    color=colour,
                    markerfacecolor=colour if part == "mlp" else LIGHT.page,
                    clip_on=False,
                    markevery=max(1, len(line) // 16),
                    **style,
                )
        axes.set_xlabel("layer")
        axes.set_ylim(0, top)
        axes.xaxis.get_major_locator().set_params(integer=True)

    told = []
    for layer in sorted({layer for line in lines.values() for layer in line}):
        values = [f"{name} {lines[part][layer]:.3g}" for part, name, _ in PARTS if layer in lines[part]]
        told.append(f"layer {layer}: {', '.join(values)}")
    title = ", ".join(look(method).label for method in methods)
    return Panel(title, picture(3.6, 2.15, f"{quantity.told.format(title)}. {'; '.join(told)}.", paint))
