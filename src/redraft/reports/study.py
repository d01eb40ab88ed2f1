"""A study's figures as markdown tables, and as pictures: tau against FLOPs, kept fraction, private width and size.

Reads results and their figures, measures nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from redraft.errors import printable
from redraft.reports.format import DASH, count, duration, number, percent, scaled
from redraft.reports.plots import COLOURS, LABEL, MARKERS, OTHERS, WIDTH, figure, png, short

TAU = "acceptance length \N{GREEK SMALL LETTER TAU}"
MORE = ("#5b6bb5", "#b0604a", "#6d8f3c", "#7a7a7a")
Row = Mapping[str, Any]
Column = Callable[[Row], str]
Point = tuple[float, float, float | None, float | None]
Curve = Sequence[Point]
"""(x, y, low, high) in order; the ends are None where there is no interval."""
_flops, _one = partial(scaled, unit="FLOP"), partial(number, digits=1)
SETS = {
    "greedy": "τ greedy",
    "sampled": "τ sampled",
    "greedy-tree": "τ greedy, tree",
    "sampled-tree": "τ sampled, tree",
    "general": "general τ, this target",
    "general-base": "general τ, base target",
}


def markdown(results: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """All tables of a study. ``figures`` are those that were worked out from ``results``."""
    parts = [f"# {results['name']}", results["about"], "", _setup(results)]
    parts += [f"![{about}]({name})" for name, about in figures.get("plots", {}).items()]
    pooled, average = figures["pooled"], figures["average"]
    for target, facts in results["targets"].items():
        rows = [row for row in pooled if row["target"] == target]
        if not rows:
            continue
        sets = [name for name in SETS if name in facts["sets"]]
        parts += [f"## {target}", _facts(facts), "### Acceptance", _acceptance(rows, sets)]
        parts += _section("### By task", _tasks(rows))
        parts += ["### Size and cost", _sizes(rows), "### FLOPs by stage", _stages(rows, "flops", _flops)]
        parts += ["### Seconds by stage", _stages(rows, "seconds", duration)]
        parts += _section("### Speed", _speed(facts.get("speed", [])))
    parts += _section("## Mean over targets", _by_row(average, _taus(list(average[0]["tau"]))) if average else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, table: str) -> list[str]:
    return [title, table] if table else []


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are figures. Empty for no rows."""
    if not rows:
        return ""
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = [list(head), rule, *rows]
    return "\n".join(
        "| " + " | ".join(printable(str(cell)).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def ranged(found: Mapping[str, float | None] | None, form: Callable[[float | None], str] = number) -> str:
    """``1.95 [1.90, 2.01]``; a dash where there is none."""
    if found is None or found["value"] is None:
        return DASH
    if found["low"] is None or found["low"] == found["high"]:
        return form(found["value"])
    return f"{form(found['value'])} [{form(found['low'])}, {form(found['high'])}]"


def label(row: Row, method_only: bool = False) -> str:
    """What tells a row from the others: method, and whatever is not the usual choice."""
    parts = [row["method"]]
    if not method_only and row["data"] != "-":
        parts.append(row["data"] + ("" if row["selection"] == "none" else f", {row['selection']}"))
    if row["loss"] not in ("-", "kl"):
        parts.append(f"loss {row['loss']}")
    if row["start"] != "none":
        parts.append(f"start {row['start']}")
    return "; ".join(parts)


# -- parts -----------------------------------------------------------------------------------------------------------
def _setup(results: Mapping[str, Any]) -> str:
    setup, config = results["setup"], results["config"]
    lines = [
        f"{setup['chain'].capitalize()}; {setup['walk']}. Sampled text at temperature {config['temperature']:g}. "
        "Square brackets: 95% bootstrap intervals over prompts, paired where two drafts are compared; a row with "
        "several seeds pools them, and the range behind it is over the seeds.",
        f"Budget: {setup['budget']} ({setup['train']['epochs']:g} epochs, steps of {setup['train']['batch_anchors']}).",
        "Recovery is (τ - τ stale) / (τ full - τ stale), full on all of the first data; gain is τ - τ stale.",
    ]
    if not results["finished"]:
        lines.append("**Not finished: some cells are missing.**")
    return "\n".join(lines)


def _facts(facts: Mapping[str, Any]) -> str:
    data = "; ".join(f"{n}: {d['rows']:,} rows, {d['tokens']:,} supervised tokens" for n, d in facts["data"].items())
    asked = ", ".join(f"{name} {len(found['prompts'])}" for name, found in facts["sets"].items())
    return f"Target `{facts['target']}`, draft `{facts['draft']}`. Data: {data or 'none'}. Evaluation prompts: {asked}."


def _by_row(rows: Sequence[Row], columns: Mapping[str, Column]) -> str:
    """A table with a line a row: what tells the row from the others, and what every column says of it."""
    return table(["method; data", *columns], [[label(row), *(say(row) for say in columns.values())] for row in rows])


def _taus(names: Sequence[str]) -> dict[str, Column]:
    return {SETS[name]: partial(_tau, name=name) for name in names}


def _tau(row: Row, name: str) -> str:
    return ranged(row["tau"].get(name))


def _acceptance(rows: Sequence[Row], sets: Sequence[str]) -> str:
    outside = [name for name in sets if name.startswith("general")]
    columns = _taus([name for name in sets if name not in outside]) | {
        "over seeds": _seeds,
        "gain": lambda row: ranged(row.get("gain", {}).get("greedy")),
        "recovery": lambda row: ranged(row.get("recovery"), percent),
        "recovery, same data and start": lambda row: ranged(row.get("recovery_same_data"), percent),
        "the same, sampled": lambda row: ranged(row.get("recovery_sampled"), percent),
    }
    return _by_row(rows, columns | {f"{SETS[name]} (change)": partial(_outside, name=name) for name in outside})


def _seeds(row: Row) -> str:
    found = row["tau_by_seed"]
    return f"{number(min(found))} to {number(max(found))}" if len(found) > 1 else DASH


def _outside(row: Row, name: str) -> str:
    change = row.get("outside", {}).get(name)
    tau = number(row["tau"][name]["value"])
    if change is None or change["value"] is None:
        return tau
    return f"{tau} ({ranged(change, lambda ratio: DASH if ratio is None else f'{100 * (ratio - 1):+.1f}%')})"


def _tasks(rows: Sequence[Row]) -> str:
    pairs = [(task, name) for task, found in rows[0]["tasks"].items() for name in found]
    head = ["method; data", *(f"{task}, {SETS[name]}" for task, name in pairs)]
    return table(head, [[label(row), *(ranged(row["tasks"][t][n]) for t, n in pairs)] for row in rows]) if pairs else ""


def _sizes(rows: Sequence[Row]) -> str:
    columns: dict[str, Column] = {
        "trained": lambda row: count(row["trained_parameters"]),
        "share of full": lambda row: percent(row["trained_share"], 1),
        "private file": lambda row: scaled(row["private_bytes"], "B"),
        "kept rows": lambda row: percent(row["kept_rows"]),
        "kept tokens": lambda row: percent(row["kept_tokens"]),
        "trained on": lambda row: count(round(row["trained_tokens"])),
        "FLOPs, training": lambda row: _flops(row["flops"].get("train")),
        "FLOPs, all": lambda row: _flops(row["flops"]["total"]),
        "from scratch to this τ": _against_scratch,
        "seconds, all": lambda row: duration(row["seconds"]["total"]),
    }
    return _by_row(rows, columns)


def _against_scratch(row: Row) -> str:
    if not (found := row.get("scratch")):
        return DASH
    return f"{percent(found['share'])} of {'' if found['reached'] else 'more than '}{_flops(found['flops'])}"


def _stages(rows: Sequence[Row], name: str, form: Callable[[float | None], str]) -> str:
    stages = [*dict.fromkeys(stage for row in rows for stage in row[name] if stage != "total"), "total"]
    return table(["method; data", *stages], [[label(row), *(form(row[name].get(s)) for s in stages)] for row in rows])


def _speed(runs: Sequence[Mapping[str, Any]]) -> str:
    head = ["decoding", "draft", "τ", "tokens/s", "speed-up over plain"]
    lines = []
    for run in runs:
        setup, plain = run["setup"], run["plain"]
        how = f"{setup['shape']} of {setup['gamma']}, {setup['sampler']}"
        lines.append([how, "plain", "1.00", ranged(plain[plain["fastest"]]["tokens_per_second"], _one), "1.00"])
        for name, found in run["drafts"].items():
            rate = ranged(found["tokens_per_second"], _one)
            if found.get("dtype", plain["fastest"]) != plain["fastest"]:
                name = f"{name} ({found['dtype']}, plain {plain['fastest']})"
            lines.append([how, name, ranged(found["tau_pooled"]), rate, ranged(found["speedup"])])
    return table(head, lines)


# -- pictures --------------------------------------------------------------------------------------------------------
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
            "size": (f"{target}: tau by size", "private file", _curves(rows, "private_bytes", label)),
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
    return _curves(
        rows, "private_width", lambda row: label({**row, "method": re.sub(r"[-_.]?\d+$", "", row["method"])})
    )


def _curves(rows: Sequence[Row], field: str, name: Column) -> dict[str, Curve]:
    """tau over a field of the rows that no selection cut, where there is one, a line a name."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        if row[field] and row["selection"] == "none":
            found.setdefault(name(row), []).append((row[field], *_ends(row["tau"]["greedy"])))
    return {key: sorted(points) for key, points in found.items()}


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
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

        for index, (name, points) in enumerate(zip(names, curves.values(), strict=True)):
            colour = COLOURS.get(name) or shades[index % len(shades)]
            x, y = [point[0] for point in points], [point[1] for point in points]
            style = f"{MARKERS[index % len(MARKERS)]}{'-' if len(points) > 1 else ''}"
            axes.plot(x, y, style, color=colour, label=short(name, LABEL), markersize=4)
            for x_at, value, low, high in points:
                if low is not None and high is not None and high > low:
                    axes.plot([x_at, x_at], [low, high], color=colour, linewidth=1, alpha=0.5)
                    axes.plot(x_at, value, style[0], color=colour, markersize=4)
        if level is not None:
            axes.axhline(level, color=COLOURS["stale"], linestyle="--", linewidth=1.2, label="stale")
        if unit:  # labels that a person reads: 15 TFLOP, 5 MB
            at = [point[0] for points in curves.values() for point in points]
            span = max(at) / min(at)
            steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if span < 10 else (1.0, 3.0) if span < 1000 else (1.0,)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=steps))
            axes.xaxis.set_major_formatter(EngFormatter(unit))
            axes.xaxis.set_minor_formatter(NullFormatter())
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
