"""The results as a table for the terminal: under each protocol the original and the updated models."""

from __future__ import annotations

import io
import sys
from textwrap import fill
from typing import TYPE_CHECKING, Any

from pipeline.report.compare import Scores
from pipeline.report.terms import METRICS, SCORES, look, ordered_protocols, percent, short

if TYPE_CHECKING:
    from rich.table import Table

Json = dict[str, Any]


def render(results: Json, width: int, colour: bool | None = None) -> str:
    """The table and the findings as text, at most `width` characters wide.

    `colour` adds terminal styles; None: if stdout is a terminal.
    """
    from rich.console import Console
    from rich.text import Text

    colour = sys.stdout.isatty() if colour is None else colour
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        color_system="auto" if colour else None,
        highlight=False,
    )
    console.print(_table(results))
    for warning in results["warnings"]:
        console.print(Text(fill(warning, max(width, 20), initial_indent="! ", subsequent_indent="  ")))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _table(results: Json) -> Table:
    from rich import box
    from rich.table import Table

    methods = [entry["method"] for entry in results["methods"]]
    metrics = measured(results["rows"])
    title = f"{results['name']}: scores in %"
    if len(results["seeds"]) > 1:
        title += f", mean ± standard deviation of {len(results['seeds'])} seeds"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    table.add_column("model", no_wrap=True)
    for metric in metrics:
        table.add_column(
            f"{METRICS[metric].label} {'↑' if METRICS[metric].higher_is_better else '↓'}", justify="right"
        )
    scores = Scores(results)
    for protocol in ordered_protocols([row["protocol"] for row in results["rows"]]):
        models = [("original", scores.row(methods[0], protocol, "original"))]
        models += [(look(method).label, scores.row(method, protocol, "updated")) for method in methods]
        best = best_values([row for _, row in models[1:] if row], metrics)
        table.add_row(f"[bold]{short(protocol)}[/bold]")
        for i, (label, row) in enumerate(models):
            cells = [_cell(row, metric, best if i else {}) for metric in metrics]
            table.add_row(f"  {label}", *cells, end_section=i == len(models) - 1)
    return table


def _cell(row: Json | None, metric: str, best: Json) -> str:
    value = row[metric] if row else None
    text = percent(value)
    if value is None or row is None:
        return text
    if row["num_seeds"] > 1:
        text += f"±{percent(row['spread'][metric])}"
    return f"[bold]{text}[/bold]" if percent(value) == percent(best.get(metric)) else text


def measured(rows: list[Json]) -> list[str]:
    """The metrics that any row has a score for."""
    return [metric for metric in SCORES if any(row[metric] is not None for row in rows)]


def best_values(rows: list[Json], metrics: list[str]) -> dict[str, float]:
    """The best score of each metric among `rows`."""
    best = {}
    for metric in metrics:
        values = [row[metric] for row in rows if row[metric] is not None]
        if values:
            best[metric] = max(values) if METRICS[metric].higher_is_better else min(values)
    return best
