"""The house style of all pictures: figures, colours and markers, and what becomes of a figure: inline SVG or PNG.

Series colours are mid tones with at least 3:1 contrast on white and on near-black; series also differ by marker,
never by colour alone. Text and grid are drawn in marker colours that become CSS variables in the SVG. No picture
holds an address or an identifier that could clash with another picture on the same page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from redraft.errors import UserError
from redraft.reports.format import missing
from redraft.reports.load import Interval

INK, GRID = "#010203", "#010204"
ON_WHITE = ("#1b1f24", "#d5d9de")  # text and grid of a PNG
COLOURS = {"stale": "#c8702a", "aligned": "#3a7fc8", "full": "#2f9461"}
OTHERS = ("#a65fb0", "#8a8420", "#c25069", "#4f8a94")
PHASES = {"draft": "#8067c0", "verify": "#3a8f8f", "other": "#85888f", "prefill": "#b08a3c"}
MARKERS = "osD^vP"
WIDTH = 4.6


def series_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for every draft: stale, aligned and full have their own, others take turns."""
    rest = [name for name in names if name not in COLOURS]
    return {name: COLOURS.get(name) or OTHERS[rest.index(name) % len(OTHERS)] for name in names}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("reports need matplotlib and jinja2: pip install 'redraft[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@contextmanager
def figure(width: float, height: float, columns: int = 1, white: bool = False) -> Iterator[Any]:
    """A figure of so many inches and its axes in the house style, closed afterwards; ``white`` for :func:`png`."""
    pyplot = _pyplot()
    ink, grid = ON_WHITE if white else (INK, GRID)
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "redraft",
        "font.size": 10,
        "font.family": "sans-serif",
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": grid,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "xtick.color": grid,
        "ytick.color": grid,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "figure.constrained_layout.use": True,
        "savefig.transparent": True,
    }
    with pyplot.rc_context(style):
        made, axes = pyplot.subplots(1, columns, figsize=(width, height))
        try:
            yield made, axes
        finally:
            pyplot.close(made)


def svg(figure: Any, name: str, about: str) -> str:
    """The figure as an inline SVG element: no prolog, metadata or addresses; CSS colours; identifiers of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r'\sid="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    text = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1inherit", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    about = about.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{about}">', text, count=1)


def png(figure: Any, dpi: int) -> bytes:
    """The figure as a PNG on white, for places that show no SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, transparent=False, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def dot(axes: Any, row: float, interval: Interval, colour: str, marker: str, size: float) -> None:
    """A figure in a row, with its interval as a bar behind it."""
    if not missing(interval.low):
        ends = [interval.low, interval.high]
        axes.plot(ends, [row, row], color=colour, linewidth=size / 2, alpha=0.45, solid_capstyle="round")
    axes.plot(interval.value, row, marker, color=colour, markersize=size)


def rows_named(axes: Any, names: Sequence[str], below: float, above: float) -> None:
    """A row a name, the first on top, with so much room below the last and above the first."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 1 + below, -above)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
