"""A figure as the page shows it: two pictures inside the page, one for light and paper, one for dark.

It is painted once; the dark picture has every colour of LIGHT replaced by its counterpart in DARK.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

from pipeline.methods import Hue


class Palette(NamedTuple):
    """The page's colours that figures share, on a light or on a dark page. No colour is in both."""

    ink: str
    muted: str
    rule: str
    page: str
    hues: dict[Hue, str]
    """Okabe and Ito's colour-blind safe set; on white darkened to a contrast of 3:1."""


LIGHT = Palette(
    ink="#1b1f24",
    muted="#5d6670",
    rule="#d5dae0",
    page="#fefefe",
    hues={
        "blue": "#0072b2",
        "orange": "#c8500a",
        "green": "#00825f",
        "purple": "#9b4f83",
        "sky": "#3d8fbf",
        "yellow": "#9a7400",
        "grey": "#6b7178",
    },
)
DARK = Palette(
    ink="#e6e9ec",
    muted="#9aa4ae",
    rule="#343b42",
    page="#14171a",
    hues={
        "blue": "#58b0e6",
        "orange": "#f0924a",
        "green": "#2fc79b",
        "purple": "#d48fbf",
        "sky": "#8fd0f5",
        "yellow": "#e6c043",
        "grey": "#9aa1a9",
    },
)

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in a font of the reader's
    "svg.hashsalt": "flearn",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": LIGHT.ink,
    "axes.edgecolor": LIGHT.rule,
    "axes.labelcolor": LIGHT.muted,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LIGHT.rule,
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT.muted,
    "ytick.color": LIGHT.muted,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "lines.solid_joinstyle": "round",
}


def picture(width: float, height: float, label: str, paint: Callable[[Any], None]) -> str:
    """One set of axes of `width` x `height` inches, painted by `paint` in the LIGHT colours, as a <picture>.

    `label` says to those who cannot see it what it shows. The same bytes each time.
    """
    light = dark = _draw(width, height, paint)
    for colour, other in zip(_colours(LIGHT), _colours(DARK), strict=True):
        dark = dark.replace(colour, other)
    return (
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{escape(label)}"></picture>'
    )


def _colours(palette: Palette) -> list[str]:
    return [palette.ink, palette.muted, palette.rule, palette.page, *palette.hues.values()]


def _data(svg: str) -> str:
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"


def _draw(width: float, height: float, paint: Callable[[Any], None]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        # No date, or no two pages would be the same.
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]  # without the DOCTYPE, which names an address
