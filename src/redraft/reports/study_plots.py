"""A study's pictures: tau against training FLOPs, against the kept fraction and against the private width."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from redraft.reports.drawing import COLOURS, MARKERS, OTHERS, WIDTH, figure, png
from redraft.reports.study import label

TAU = "acceptance length \N{GREEK SMALL LETTER TAU}"
MORE = ("#5b6bb5", "#b0604a", "#6d8f3c", "#7a7a7a")
Row = Mapping[str, Any]
Point = tuple[float, float, float | None, float | None]
Curve = Sequence[Point]
"""(x, y, low, high) in order; the ends are None where there is no interval."""


def pictures(results: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, tuple[str, bytes]]:
    """File name to (what it shows, PNG), for every target that has at least two points to draw."""
    found: dict[str, tuple[str, bytes]] = {}
    for target in results["targets"]:
        rows = [row for row in figures["pooled"] if row["target"] == target]
        cells = [cell for cell in results["cells"] if cell["target"] == target]
        stale = next((row["tau"]["greedy"]["value"] for row in rows if row["method"] == "none"), None)
        drawn = {
            "flops": (f"{target}: held-out tau while training", "training FLOPs", training_curves(results, cells)),
            "kept": (f"{target}: tau by kept share", "kept share of the supervised tokens", kept_curves(results, rows)),
            "width": (f"{target}: tau by private width", "private width", width_curves(rows)),
            "size": (f"{target}: tau by size", "private file", size_points(rows)),
        }
        for kind, (about, axis, curves) in drawn.items():
            if sum(map(len, curves.values())) >= 2:
                name = re.sub(r"[^A-Za-z0-9+.-]", "_", f"{kind}-{target}") + ".png"
                unit = {"flops": "FLOP", "size": "B"}.get(kind)
                found[name] = (about, draw(curves, about, axis, stale if kind != "flops" else None, unit))
    return found


def training_curves(results: Mapping[str, Any], cells: Sequence[Row]) -> dict[str, Curve]:
    """Held-out tau over the FLOPs of the steps so far, a line a method, first seed, on the first data unselected."""
    first = next(iter(results["config"]["data"]))
    found: dict[str, Curve] = {}
    for cell in cells:
        if cell["data"] != first or cell["selection"] != "none" or not cell.get("heldout"):
            continue
        per_step = cell["flops"]["train"] / max(1, cell["steps"])
        points = [(per_step * step, tau, None, None) for step, tau in cell["heldout"] if step]
        found.setdefault(label(cell, method_only=True), points)
    return found


def kept_curves(results: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Curve]:
    """tau over what selection keeps, a line for every method and scorer; all of the data closes every line."""
    named = results["config"]["selections"]
    found: dict[str, list[Point]] = {}
    whole: dict[str, Point] = {}
    for row in rows:
        if row["kept_tokens"] is None:
            continue
        start = label({**row, "selection": "none"})
        point = (row["kept_tokens"], *_ends(row["tau"]["greedy"]))
        if row["selection"] == "none":
            whole[start] = point
            continue
        entry = named.get(row["selection"])
        scorer = entry["scorer"] if entry else row["selection"].rpartition("@")[0]
        where = " on prompts" if entry and entry["on"] == "prompts" else ""
        mixed = f" + {entry['general']:.0%} general" if entry and entry["general"] else ""
        found.setdefault(f"{start}; {scorer}{where}{mixed}", []).append(point)
    for name, points in found.items():
        points += [point for start, point in whole.items() if name.startswith(f"{start}; ")][:1]
    return {name: sorted(points) for name, points in found.items()}


def width_curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """tau over the inner width of the private expert; names of one method's widths share what stands before a digit."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        if row["private_width"] and row["selection"] == "none":
            series = re.sub(r"[-_.]?\d+$", "", row["method"])
            name = label({**row, "method": series})
            found.setdefault(name, []).append((row["private_width"], *_ends(row["tau"]["greedy"])))
    return {name: sorted(points) for name, points in found.items()}


def size_points(rows: Sequence[Row]) -> dict[str, Curve]:
    """tau over the bytes that a target needs of its own, a point a method on the same data."""
    found: dict[str, Curve] = {}
    for row in rows:
        if row["private_bytes"] and row["selection"] == "none":
            found.setdefault(label(row), [(row["private_bytes"], *_ends(row["tau"]["greedy"]))])
    return found


def _ends(found: Mapping[str, float | None]) -> tuple[Any, float | None, float | None]:
    return found["value"], found["low"], found["high"]


def draw(curves: Mapping[str, Curve], title: str, axis: str, level: float | None, unit: str | None) -> bytes:
    """One picture of lines with bars for intervals; ``level`` is tau of the stale draft. PNG.

    With a ``unit`` x is a quantity, and its axis logarithmic. The legend is in the order in which the lines end.
    """
    shades = [*OTHERS, *MORE]
    curves = dict(sorted(apart(curves, bool(unit)).items(), key=lambda item: -item[1][-1][1]))
    names, common = shorter(list(curves))
    with figure(1.9 * WIDTH, 3.6 + 0.09 * len(curves), white=True) as (made, axes):
        for index, (name, points) in enumerate(zip(names, curves.values(), strict=True)):
            colour = COLOURS.get(name) or shades[index % len(shades)]
            x, y = [point[0] for point in points], [point[1] for point in points]
            style = f"{MARKERS[index % len(MARKERS)]}{'-' if len(points) > 1 else ''}"
            axes.plot(x, y, style, color=colour, label=name, markersize=4)
            for at, value, low, high in points:
                if low is not None and high is not None and high > low:
                    axes.plot([at, at], [low, high], color=colour, linewidth=1, alpha=0.5)
                    axes.plot(at, value, style[0], color=colour, markersize=4)
        if level is not None:
            axes.axhline(level, color=COLOURS["stale"], linestyle="--", linewidth=1.2, label="stale")
        if unit:
            _quantities(axes, unit, [point[0] for points in curves.values() for point in points])
        axes.set_xlabel(axis)
        axes.set_ylabel(TAU)
        axes.set_title(title)
        made.legend(loc="outside right upper", fontsize=8, title=common or None, title_fontsize=8, alignment="left")
        return png(made, 130)


def shorter(names: Sequence[str]) -> tuple[list[str], str]:
    """The names without the parts that all of them have, and these parts; a new draft knows no start."""
    parts = [name.split("; ") for name in names]
    old = [found for found in parts if not found[0].startswith("scratch")]
    common = [part for part in (old[0][1:] if len(old) > 1 else []) if all(part in found[1:] for found in old)]
    short = ["; ".join(part for part in found if part not in common) for found in parts]
    return (short, "; ".join(common)) if len(set(short)) == len(names) else (list(names), "")


def apart(curves: Mapping[str, Curve], logarithmic: bool) -> dict[str, Curve]:
    """The curves with points that have intervals at one x moved a little beside each other."""
    xs = [point[0] for points in curves.values() for point in points]
    ratio = logarithmic and max(xs) > min(xs) > 0
    step = math.log(max(xs) / min(xs)) / 120 if ratio else (max(xs) - min(xs)) / 120

    def crowd(x: float) -> list[int]:
        """Which curves have an interval about here."""
        close = ((i, p) for i, points in enumerate(curves.values()) for p in points if p[2] is not None)
        return [i for i, p in close if abs(math.log(x / p[0]) if ratio else x - p[0]) < step / 2]

    found: dict[str, Curve] = {}
    for index, (name, points) in enumerate(curves.items()):
        moved = []
        for x, value, low, high in points:
            there = crowd(x)
            shift = (there.index(index) - (len(there) - 1) / 2) * step if index in there else 0.0
            moved.append((x * math.exp(shift) if ratio else x + shift, value, low, high))
        found[name] = moved
    return found


def _quantities(axes: Any, unit: str, values: Sequence[float]) -> None:
    """A logarithmic x axis with labels that a person reads: 15 TFLOP, 5 MB."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    span = max(values) / min(values)
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if span < 10 else (1.0, 3.0) if span < 1000 else (1.0,)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(EngFormatter(unit))
    axes.xaxis.set_minor_formatter(NullFormatter())
