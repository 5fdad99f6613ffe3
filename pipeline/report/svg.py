"""Turns a matplotlib figure into SVG that lives inside the page: its colours and font, the same bytes each
time, no addresses.

Figures are drawn in the light page's colours; each is then replaced by the CSS variable of that name, so that
dark mode and printing need no second picture.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

from pipeline.report.names import HUES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAGE = "#1b1f24", "#5d6670", "#d5dae0", "#fefefe"
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAGE: "page"} | {
    light: f"hue-{hue}" for hue, (light, _) in HUES.items()
}

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "hatch.linewidth": 0.8,
}


def inline(figure: Figure, key: str, label: str) -> str:
    """The figure as an <svg> element. `key` is unique on the page; `label` says to those who cannot see it
    what it shows.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": key}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    body = buffer.getvalue().partition("<svg")[2]
    opening, _, body = body.partition(">")
    body = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = _own_ids(_shared_font(_shared_colours(" ".join(body.split()))), key)
    view = re.search(r'viewBox="[^"]*"', opening)
    assert view is not None
    return f'<svg {view.group()} role="img" aria-label="{escape(label)}">{body}'


def _shared_colours(body: str) -> str:
    for colour, name in _VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    return re.sub(r'(fill|stroke)="(var\(--[a-z-]+\))"', r'style="\1: \2"', body)


def _shared_font(body: str) -> str:
    return re.sub(r"\s*font-family: [^;\"]*;?", "", body)


def _own_ids(body: str, key: str) -> str:
    """Drop ids that nothing refers to, and make the others unique on the page."""
    used = set(re.findall(r"url\(#([^)]+)\)", body)) | set(re.findall(r'href="#([^"]+)"', body))
    body = re.sub(r' id="([^"]*)"', lambda match: f' id="{key}-{match[1]}"' if match[1] in used else "", body)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", body)
