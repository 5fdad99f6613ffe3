"""The report's figures: each function takes rows of results.json and returns one or more panels, drawn by
matplotlib.

Colours belong to methods and are the same in every figure. F-Learning is filled, methods without forgetting
are hollow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.report.cost import duration, size, step_label
from pipeline.report.names import HUES, METRICS, PROTOCOLS, STATES, look
from pipeline.report.svg import INK, MUTED, PAGE, STYLE, inline

Json = dict[str, Any]


class Panel(NamedTuple):
    """One picture with its title; `svg` is ready for the page."""

    title: str
    svg: str


def _draw(width: float, height: float, key: str, label: str, paint: Callable[[Any], None]) -> str:
    """One set of axes of `width` x `height` inches, painted by `paint`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        return inline(figure, key, label)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f}%"


def _fill(method: str) -> dict[str, Any]:
    """Bars and markers of a method: its colour, filled or hollow."""
    colour = HUES[look(method).hue][0]
    return {"facecolor": colour if look(method).is_filled else PAGE, "edgecolor": colour}


LINES = (
    ("new_answer", "new answer", {"linestyle": "-", "marker": "o"}),
    ("old_answer", "old answer", {"linestyle": "--", "marker": "s"}),
    ("locality", "locality", {"linestyle": ":", "marker": "^"}),
)


def forgetting_curves(curves: list[Json]) -> dict[str, list[Panel]]:
    """For each protocol, a panel per method that forgets: old answer, new answer and locality from state to
    state.
    """
    panels: dict[str, list[Panel]] = {}
    for protocol in dict.fromkeys(row["protocol"] for row in curves):
        rows = [row for row in curves if row["protocol"] == protocol]
        for method in dict.fromkeys(row["method"] for row in rows if row["state"] == "forgotten"):
            panels.setdefault(protocol, []).append(
                _curve(method, protocol, [row for row in rows if row["method"] == method])
            )
    return panels


def _curve(method: str, protocol: str, rows: list[Json]) -> Panel:
    colours = {"new_answer": HUES[look(method).hue][0], "old_answer": INK, "locality": MUTED}

    def paint(axes: Any) -> None:
        for key, _, style in LINES:
            points = [(i, 100 * row[key]) for i, row in enumerate(rows) if row[key] is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colours[key],
                    markerfacecolor=PAGE if key != "new_answer" else colours[key],
                    **style,
                )
        axes.set_xticks(range(len(rows)), [STATES[row["state"]] for row in rows])
        axes.set_xlim(-0.25, len(rows) - 0.75)
        _percent_axis(axes)
        axes.grid(axis="x", visible=False)

    told = "; ".join(
        f"{STATES[row['state']]}: " + ", ".join(f"{name} {_percent(row[key])}" for key, name, _ in LINES)
        for row in rows
    )
    label = (
        f"{look(method).label}, {PROTOCOLS[protocol].short if protocol in PROTOCOLS else protocol}. {told}."
    )
    svg = _draw(3.6, 2.15, f"curve-{protocol}-{method}", label, paint)
    return Panel(look(method).label, svg)


def _percent_axis(axes: Any) -> None:
    axes.set_ylim(-4, 104)
    axes.set_yticks([0, 25, 50, 75, 100])


def bars(rows: list[Json], protocol: str, metrics: list[str]) -> str:
    """The updated models' scores under one protocol: a group per metric, a bar per method, two standard
    errors as whiskers.
    """
    updated = [row for row in rows if row["state"] == "updated" and row["protocol"] == protocol]
    original = next((row for row in rows if row["state"] == "original" and row["protocol"] == protocol), None)
    width = 0.8 / max(len(updated), 1)

    def paint(axes: Any) -> None:
        for i, row in enumerate(updated):
            for x, metric in enumerate(metrics):
                if row[metric] is not None:
                    error = 200 * (row["stderr"].get(metric) or 0)
                    axes.bar(
                        x - 0.4 + (i + 0.5) * width, 100 * row[metric], 0.8 * width, yerr=error, error_kw={"ecolor": INK, "elinewidth": 1},
                        linewidth=1.4, **_fill(row["method"]),
                    )  # fmt: skip
        for x, metric in enumerate(metrics):
            if original and original[metric] is not None:
                axes.hlines(
                    100 * original[metric],
                    x - 0.45,
                    x + 0.45,
                    color=INK,
                    linewidth=1.4,
                    linestyle=(0, (2, 1.5)),
                )
        axes.set_xticks(range(len(metrics)), [_directed(metric) for metric in metrics])
        _percent_axis(axes)
        axes.grid(axis="x", visible=False)

    told = "; ".join(
        f"{look(row['method']).label}: "
        + ", ".join(f"{metric} {_percent(row[metric])}" for metric in metrics)
        for row in updated
    )
    return _draw(7.6, 2.3, f"bars-{protocol}", f"Scores after the update. {told}.", paint)


def _directed(metric: str) -> str:
    return f"{METRICS[metric].label} {'↑' if METRICS[metric].higher_is_better else '↓'}"


def cost(stages: list[Json]) -> list[Panel]:
    """Seconds and peak memory of every step; evaluations are taken together."""
    steps = [step for step in stages if step["stage"] != "evaluate"]
    evaluations = [step for step in stages if step["stage"] == "evaluate"]
    if evaluations:
        total = {
            "stage": f"evaluate, {len(evaluations)} models",
            "methods": [],
            "seconds": sum(s["seconds"] for s in evaluations),
        }
        steps.append(total | {"peak_memory_bytes": max(s["peak_memory_bytes"] for s in evaluations)})
    return [
        _horizontal("Time", "seconds", steps, duration),
        _horizontal("Peak memory", "peak_memory_bytes", steps, size),
    ]


def _horizontal(title: str, key: str, steps: list[Json], tell: Callable[[Any], str]) -> Panel:
    values = [step[key] for step in steps]

    def paint(axes: Any) -> None:
        for y, (step, value) in enumerate(zip(steps, values, strict=True)):
            fill = (
                _fill(step["methods"][0])
                if len(step["methods"]) == 1
                else {"facecolor": MUTED, "edgecolor": MUTED}
            )
            axes.barh(y, value, 0.62, linewidth=1.2, **fill)
            axes.annotate(
                tell(value),
                (value, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=MUTED,
            )
        axes.set_yticks(range(len(steps)), [step_label(step) for step in steps])
        axes.set_ylim(len(steps) - 0.5, -0.5)
        axes.set_xlim(0, 1.3 * max(values, default=1) or 1)
        axes.set_xticks([])
        axes.grid(visible=False)

    told = "; ".join(f"{step_label(step)} {tell(value)}" for step, value in zip(steps, values, strict=True))
    return Panel(
        title,
        _draw(
            5.2, 0.5 + 0.24 * len(steps), f"cost-{key.replace('_', '-')}", f"{title} by step. {told}.", paint
        ),
    )


class Quantity(NamedTuple):
    """A figure of results.json's `layers`, drawn as `factor` times its value on an axis that reaches
    `least_top` at least.

    `told` says to those who cannot see the picture what it shows of a method.
    """

    figure: str
    told: str
    factor: float
    least_top: float


NORM = Quantity("delta_norm", "Norm of the forget vector of {}", 1, 0)
RELATIVE_NORM = Quantity(
    "relative_norm", "Norm of the forget vector of {}, in % of the original weights' norm", 100, 0
)
SURVIVAL = Quantity(
    "projection", "Share of the intended change of {} that the stored weights keep, in %", 100, 100
)

PARTS = (
    ("mlp", "MLP", {"linestyle": "-", "marker": "o"}),
    ("attention", "attention", {"linestyle": "--", "marker": "s", "markerfacecolor": PAGE}),
)

Lines = dict[str, dict[int, float]]
"""By part (`PARTS`), its value in each layer that has one."""


def by_layer(layers: dict[str, list[Json]], quantity: Quantity) -> list[Panel]:
    """One of the forget vectors' quantities by layer, attention against MLP, on one scale (`NORM`: the
    paper's Figures 4 and 5).

    Methods whose lines are the same share a panel: the norms of those that subtract the same vector do.
    """
    lines = {method: _lines(rows, quantity) for method, rows in layers.items()}
    shared: dict[str, list[str]] = {}
    for method, parts in lines.items():
        if any(parts.values()):
            shared.setdefault(repr(parts), []).append(method)
    top = 1.1 * max(
        [
            quantity.least_top,
            *(value for parts in lines.values() for line in parts.values() for value in line.values()),
        ]
    )
    return [_layer_panel(methods, lines[methods[0]], quantity, top or 1) for methods in shared.values()]


def _lines(rows: list[Json], quantity: Quantity) -> Lines:
    values = {part: {row["layer"]: row[part][quantity.figure] for row in rows} for part, _, _ in PARTS}
    return {
        part: {layer: quantity.factor * x for layer, x in line.items() if x is not None}
        for part, line in values.items()
    }


def _layer_panel(methods: list[str], lines: Lines, quantity: Quantity, top: float) -> Panel:
    colour = HUES[look(methods[0]).hue][0]

    def paint(axes: Any) -> None:
        for part, _, style in PARTS:
            if line := lines[part]:
                axes.plot(
                    list(line),
                    list(line.values()),
                    color=colour,
                    clip_on=False,
                    markevery=max(1, len(line) // 16),
                    **style,
                )
        axes.set_xlabel("layer")
        axes.set_ylim(0, top)
        axes.xaxis.get_major_locator().set_params(integer=True)

    title = ", ".join(look(method).label for method in methods)
    told = "; ".join(
        f"layer {layer}: "
        + ", ".join(f"{name} {lines[part][layer]:.3g}" for part, name, _ in PARTS if layer in lines[part])
        for layer in sorted({layer for line in lines.values() for layer in line})
    )
    label = f"{quantity.told.format(title)}. {told}."
    return Panel(title, _draw(3.6, 2.15, f"{quantity.figure}-{methods[0]}", label, paint))
