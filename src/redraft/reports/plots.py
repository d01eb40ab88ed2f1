"""The pictures of a benchmark and of a training, and their house style: figures, colours, inline SVG or PNG.

Series colours are mid tones with at least 3:1 contrast on white and on near-black; series also differ by marker,
never by colour alone. Text and grid are drawn in marker colours that become CSS variables in the SVG. No picture
holds an address or an identifier that could clash with another picture on the same page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from redraft.errors import UserError, printable
from redraft.reports import sections
from redraft.reports.format import missing, number
from redraft.reports.load import BenchResult, CurvePoint, Interval

INK, GRID = "#010203", "#010204"
ON_WHITE = ("#1b1f24", "#d5d9de")  # text and grid of a PNG
COLOURS = {"stale": "#c8702a", "aligned": "#3a7fc8", "full": "#2f9461"}
OTHERS = ("#a65fb0", "#8a8420", "#c25069", "#4f8a94")
PHASES = {"draft": "#8067c0", "verify": "#3a8f8f", "other": "#85888f", "prefill": "#b08a3c"}
MARKERS = "osD^vP"
WIDTH = 4.6
LABEL = 32  # characters of a name in a legend
Colours = Mapping[str, str]
Groups = Mapping[str, Mapping[str, Interval]]


def series_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for every draft: stale, aligned and full have their own, others take turns."""
    rest = [name for name in names if name not in COLOURS]
    return {name: COLOURS.get(name) or OTHERS[rest.index(name) % len(OTHERS)] for name in names}


def result_colours(result: BenchResult) -> dict[str, str]:
    """A colour for plain decoding and for everything that any part of the result names."""
    names = [*result.drafts, *(key for trace in result.traces for key in trace.drafts)]
    names += [key for level in (result.server.levels if result.server else []) for key in level.contestants]
    return series_colours([name for name in dict.fromkeys(names) if name != "plain"]) | {"plain": PHASES["other"]}


@contextmanager
def figure(width: float, height: float, columns: int = 1, white: bool = False) -> Iterator[Any]:
    """A figure of so many inches and its axes in the house style, closed afterwards; ``white`` for :func:`png`."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("reports need matplotlib and jinja2: pip install 'redraft[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ink, grid = ON_WHITE if white else (INK, GRID)
    with pyplot.rc_context():
        pyplot.rc("svg", fonttype="none", hashsalt="redraft")
        pyplot.rc("font", size=10, family="sans-serif")
        pyplot.rc("text", color=ink, parse_math=False)  # a name may hold dollars
        pyplot.rc("axes", labelcolor=ink, edgecolor=grid, grid=True, axisbelow=True)
        pyplot.rc("axes", titlesize=10.5, titlelocation="left", titleweight="bold")
        pyplot.rc("axes.spines", top=False, right=False)
        pyplot.rc("grid", color=grid, linewidth=0.8)
        pyplot.rc(("xtick", "ytick"), color=grid, labelcolor=ink, labelsize=9)
        pyplot.rc("legend", frameon=False, fontsize=9)
        pyplot.rc("lines", linewidth=1.8, markersize=5)
        pyplot.rc("figure.constrained_layout", use=True)
        pyplot.rc("savefig", transparent=True)
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
    about = printable(about).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>"
    return re.sub(head, lambda m: f'<svg {m[1]} role="img" aria-label="{about}">', text, count=1)


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


def reference(axes: Any, at: float) -> None:
    """A dashed line that figures are held against."""
    axes.axvline(at, color=PHASES["other"], linestyle="--", linewidth=1.2)


def rows_named(axes: Any, names: Sequence[str], below: float, above: float) -> None:
    """A row a name, the first on top, with so much room below the last and above the first."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 1 + below, -above)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _dots(axes: Any, result: BenchResult, title: str, unit: str, digits: int, figures: Mapping[str, Interval]) -> None:
    """A draft's dot with its interval a row, the first on top, each with its figure beside it; ratios beside 1."""
    colours = series_colours(list(result.drafts))
    if unit:
        reference(axes, 1)
    for row, (name, found) in enumerate(figures.items()):
        dot(axes, row, found, colours[name], MARKERS[row % len(MARKERS)], 8)
        words, place = f"{found.value:.{digits}f}{unit}", (found.value, row)
        axes.annotate(words, place, (0, 9), textcoords="offset points", ha="center", fontweight="bold")
    rows_named(axes, [short(name, LABEL) for name in figures], 0.5, 0.75)
    axes.margins(x=0.12)
    axes.set_title(title)


def headline_figures(result: BenchResult) -> list[tuple[str, str, int, dict[str, Interval]]]:
    """What the headline's pictures show: (title, unit, digits, interval by draft).

    Acceptance length, and the speed-up where every draft has one, else tokens a second where any has.
    """
    drafts = result.drafts.items()
    tau = {name: draft.tau_pooled for name, draft in drafts}
    found = [("acceptance length \N{GREEK SMALL LETTER TAU} (tokens a round)", "", 2, tau)]
    ratios = {name: draft.speedup for name, draft in drafts if draft.speedup}
    rates = {name: draft.tokens_per_second for name, draft in drafts if draft.tokens_per_second}
    if result.plain and len(ratios) == len(tau):
        found.append((f"speed-up over plain {result.plain.fastest}", "\N{MULTIPLICATION SIGN}", 2, ratios))
    elif rates:
        found.append(("tokens a second", "", 1, rates))
    return found


def headline_svgs(result: BenchResult, name: str) -> list[str]:
    """Acceptance length and speed with intervals: two pictures that a narrow page stacks."""
    pictures = []
    for index, shown in enumerate(headline_figures(result)):
        with figure(WIDTH, 0.95 + 0.55 * len(result.drafts)) as (made, axes):
            _dots(axes, result, *shown)
            about = f"{('acceptance length', 'speed')[index]} of each draft with its interval"
            pictures.append(svg(made, f"{name}-headline{index}", about))
    return pictures


def headline_figure_png(result: BenchResult) -> bytes:
    """The headline picture on white, for places that show no SVG."""
    shown = headline_figures(result)
    with figure(len(shown) * WIDTH, 0.95 + 0.55 * len(result.drafts), len(shown), white=True) as (made, axes):
        for each, what in zip(axes if len(shown) > 1 else [axes], shown, strict=True):
            _dots(each, result, *what)
        return png(made, 160)


def grouped_svg(groups: Groups, colours: Colours, title: str, name: str, line: float | None = None) -> str:
    """Dots with intervals: a band a group (a task), in it a row a series (a draft); ``line`` is a dashed reference."""
    series = list(dict.fromkeys(key for figures in groups.values() for key in figures))
    pitch = 0.8 / max(len(series), 1)
    inches = 1.05 + sum(0.12 + 0.2 * len(series) for _ in groups)
    with figure(WIDTH, inches) as (made, axes):
        for band, figures in enumerate(groups.values()):
            for key, interval in figures.items():
                row = band + (series.index(key) - (len(series) - 1) / 2) * pitch
                dot(axes, row, interval, colours[key], MARKERS[series.index(key) % len(MARKERS)], 6)
        for key in series:
            axes.plot([], [], MARKERS[series.index(key) % len(MARKERS)], color=colours[key], label=short(key, LABEL))
        if line is not None:
            reference(axes, line)
        rows_named(axes, [short(group) for group in groups], 0.5, 0.5)
        for band in range(1, len(groups)):
            axes.axhline(band - 0.5, color=GRID, linewidth=0.8)
        axes.margins(x=0.08)
        axes.set_title(title)
        made.legend(loc="outside lower right", ncols=min(3, len(series)), handletextpad=0.2, columnspacing=1.0)
        spoken = "; ".join(
            f"{group}: " + ", ".join(f"{key} {number(found.value)}" for key, found in figures.items())
            for group, figures in groups.items()
        )
        return svg(made, name, f"{title}, by group, with intervals: {spoken}")


def task_svgs(result: BenchResult, name: str, colours: Colours) -> list[str]:
    """tau by task, and the speed-up (tokens a second without a baseline) by task."""
    pictures = []
    if groups := sections.task_figures(result, "tau_pooled"):
        pictures.append(grouped_svg(groups, colours, "acceptance length by task", f"{name}-task-tau"))
    if groups := sections.task_figures(result, "speedup"):
        pictures.append(grouped_svg(groups, colours, "speed-up by task", f"{name}-task-speed", line=1.0))
    elif groups := sections.task_figures(result, "tokens_per_second"):
        pictures.append(grouped_svg(groups, colours, "tokens a second by task", f"{name}-task-speed"))
    return pictures


def quality_svg(scores: Mapping[str, Mapping[str, Any]], name: str, colours: Colours) -> str | None:
    """The scores by task; None where none has a figure."""
    groups = {task: {key: s.score for key, s in by_name.items() if s.score} for task, by_name in scores.items()}
    groups = {task: figures for task, figures in groups.items() if figures}
    return grouped_svg(groups, colours, "score by task", f"{name}-quality") if groups else None


def short(text: str, limit: int = 18) -> str:
    """A name as a picture can show it: one line of ``limit`` characters at most, in legends whatever it begins with."""
    text = printable(text)
    text = f" {text}" if text.startswith("_") else text
    return text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def level_svgs(result: BenchResult, name: str, colours: Colours) -> list[str]:
    """Tokens a second, and the time to the first token, by the number of requests under way (on a base-2 axis).

    One line a series, with its interval as a shade.
    """
    titles = {"tokens_per_second": "tokens a second, all requests", "ttft": "median time to the first token, s"}
    xlabel, pictures = "requests under way", []
    for field, curves in sections.levels(result).items():
        title = titles[field]
        with figure(WIDTH, 2.9) as (made, axes):
            for marker, (key, points) in zip(MARKERS * len(curves), curves.items(), strict=False):
                at = [x for x, _ in points]
                axes.plot(at, [y.value for _, y in points], f"{marker}-", color=colours[key], label=short(key, LABEL))
                if all(not missing(y.low) for _, y in points):
                    low, high = [[getattr(y, end) for _, y in points] for end in ("low", "high")]
                    axes.fill_between(at, low, high, color=colours[key], alpha=0.18, linewidth=0)
            ticks = sorted({x for points in curves.values() for x, _ in points})
            if min(ticks) > 0 and max(ticks) / min(ticks) >= 4:
                axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel(xlabel)
            axes.set_title(title)
            axes.legend()
            spoken = "; ".join(
                f"{key}: " + ", ".join(f"{y.value:.4g} at {x:g}" for x, y in points) for key, points in curves.items()
            )
            pictures.append(svg(made, f"{name}-level-{field}", f"{title} over {xlabel}: {spoken}"))
    return pictures


def acceptance_svgs(result: BenchResult, name: str) -> list[str]:
    """Acceptance by position: given that the position was reached, and over all rounds."""
    colours, pictures = series_colours(list(result.drafts)), []
    titles = {"conditional": "accepted, given that it was reached", "unconditional": "accepted, of all rounds"}
    for kind, title in titles.items():
        curves = {key: getattr(draft, f"acceptance_{kind}") for key, draft in result.drafts.items()}
        if not any(curves.values()):
            continue
        with figure(WIDTH, 2.9) as (made, axes):
            for marker, (key, curve) in zip(MARKERS * len(curves), curves.items(), strict=False):
                values = [float("nan") if v is None else v for v in curve]
                axes.plot(range(1, len(curve) + 1), values, f"{marker}-", color=colours[key], label=short(key, LABEL))
            axes.set_ylim(0, 1)
            axes.set_xticks(range(1, max(map(len, curves.values())) + 1))
            axes.set_xlabel("drafted position")
            axes.set_title(title)
            axes.legend()
            pictures.append(svg(made, f"{name}-{kind}", f"Share of draft tokens {title}, by position"))
    return pictures


def time_svg(result: BenchResult, name: str) -> str | None:
    """One bar a draft: what a round costs, and (in plain tokens) a tick at tau, the tokens it yields."""
    costs = sections.round_costs(result)
    if not costs:
        return None
    relative = result.plain is not None
    with figure(WIDTH, 1.45 + 0.42 * len(costs)) as (made, axes):
        for row, cost in enumerate(costs.values()):
            left = 0.0
            for phase, colour in PHASES.items():
                width = cost[phase]
                axes.barh(row, width, 0.55, left=left, color=colour, label=phase if row == 0 else None)
                left += width
            if relative:
                label = "yield, \N{GREEK SMALL LETTER TAU}" if row == 0 else None
                axes.plot([cost["tau"]] * 2, [row - 0.38, row + 0.38], color=INK, linewidth=2, label=label)
        rows_named(axes, [short(key) for key in costs], 0.55, 0.55)
        axes.set_xlim(0, 1.06 * max(max(cost["total"], cost["tau"] if relative else 0) for cost in costs.values()))
        unit = "tokens of plain decoding" if relative else "milliseconds"
        axes.set_xlabel(f"cost of a round, in {unit}")
        handles, labels = axes.get_legend_handles_labels()
        named = sorted(zip(handles, labels, strict=True), key=lambda pair: pair[1] not in PHASES)
        place = {"loc": "outside upper left", "ncols": 3, "handlelength": 1.0, "columnspacing": 1.8}
        made.legend(*zip(*named, strict=True), **place)
        about = "; ".join(
            f"{key}: a round costs {number(cost['total'])} {unit} and yields {number(cost['tau'])} tokens"
            for key, cost in costs.items()
        )
        return svg(made, f"{name}-time", about)


def training_svgs(points: Sequence[CurvePoint], stale: tuple[str, float] | None) -> list[str]:
    """Training loss and held-out acceptance length over tokens seen, and ``stale`` (label, tau) as a dashed line."""
    label, at, pictures = "step", [float(p.step) for p in points], []
    if points[-1].tokens > 0:
        label, at = "supervised tokens (thousands)", [p.tokens / 1000 for p in points]
    with figure(WIDTH, 2.7) as (made, axes):
        losses = [(x, p.loss) for x, p in zip(at, points, strict=True) if p.loss is not None]
        # a line through one point is nothing at all
        axes.plot(*zip(*losses, strict=True), "-" if losses[1:] else "o", color=COLOURS["aligned"], linewidth=1.4)
        axes.set_title("training loss")
        axes.set_xlabel(label)
        pictures.append(svg(made, "curve-loss", "Training loss"))
    held = [(x, p.heldout_tau) for x, p in zip(at, points, strict=True) if p.heldout_tau is not None]
    if held:
        with figure(WIDTH, 2.7) as (made, axes):
            axes.plot(*zip(*held, strict=True), "o-", color=COLOURS["aligned"], label="in training")
            if stale is not None:
                axes.axhline(stale[1], color=COLOURS["stale"], linestyle="--", label=short(stale[0], LABEL))
            axes.legend()
            axes.set_title("held-out acceptance length \N{GREEK SMALL LETTER TAU}")
            axes.set_xlabel(label)
            pictures.append(svg(made, "curve-tau", "Held-out acceptance length during training"))
    return pictures
