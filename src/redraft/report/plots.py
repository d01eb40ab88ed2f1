"""The pictures, as inline SVG that takes the page's text colour, and as PNG for a README.

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

from redraft.errors import UserError
from redraft.report.costs import round_costs
from redraft.report.format import missing, number
from redraft.report.load import BenchResult, CurvePoint, Interval

INK, GRID = "#010203", "#010204"
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
def _figure(width: float, height: float, columns: int = 1, ink: str = INK, grid: str = GRID) -> Iterator[Any]:
    """A figure and its axes in the house style, closed afterwards."""
    pyplot = _pyplot()
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
        figure, axes = pyplot.subplots(1, columns, figsize=(width, height))
        try:
            yield figure, axes
        finally:
            pyplot.close(figure)


def _svg(figure: Any, name: str, about: str) -> str:
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


def _dots(axes: Any, entries: list[tuple[str, str, Interval]], title: str, digits: int, unit: str = "") -> None:
    """A dot with its interval a row, the first on top, each with its figure beside it."""
    for row, (_, colour, figure) in enumerate(entries):
        if not missing(figure.low):
            axes.plot(
                [figure.low, figure.high], [row, row], color=colour, linewidth=4, alpha=0.45, solid_capstyle="round"
            )
        axes.plot(figure.value, row, MARKERS[row % len(MARKERS)], color=colour, markersize=8)
        axes.annotate(
            f"{figure.value:.{digits}f}{unit}",
            (figure.value, row),
            (0, 9),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
        )
    axes.set_yticks(range(len(entries)), [name for name, _, _ in entries])
    axes.set_ylim(len(entries) - 0.5, -0.75)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_title(title)


def speed_figures(result: BenchResult) -> tuple[str, str, int, dict[str, Interval]]:
    """What the speed pictures show: (title, unit, digits, interval by draft).

    The speed-up where every draft has one, else tokens a second; empty where there is neither.
    """
    drafts = result.drafts.items()
    ratios = {name: draft.speedup for name, draft in drafts if draft.speedup}
    if result.plain and len(ratios) == len(result.drafts):
        return f"speed-up over plain {result.plain.fastest}", "\N{MULTIPLICATION SIGN}", 2, ratios
    rates = {name: draft.tokens_per_second for name, draft in drafts if draft.tokens_per_second}
    return "tokens a second", "", 1, rates


def _headline_axes(result: BenchResult, tau_axes: Any, speed_axes: Any) -> None:
    colours = series_colours(list(result.drafts))
    if tau_axes is not None:
        tau = [(name, colours[name], draft.tau_pooled) for name, draft in result.drafts.items()]
        _dots(tau_axes, tau, "acceptance length \N{GREEK SMALL LETTER TAU} (tokens a round)", 2)
    if speed_axes is not None:
        title, unit, digits, figures = speed_figures(result)
        if unit:
            speed_axes.axvline(1, color=PHASES["other"], linestyle="--", linewidth=1.2)
        _dots(speed_axes, [(name, colours[name], figure) for name, figure in figures.items()], title, digits, unit)


def headline_svgs(result: BenchResult, name: str) -> list[str]:
    """Acceptance length and speed with intervals: two pictures that a narrow page stacks."""
    height = 0.95 + 0.55 * len(result.drafts)
    pictures = []
    for index, what in enumerate(("acceptance length", "speed")):
        if index and not speed_figures(result)[3]:
            continue
        with _figure(WIDTH, height) as (figure, axes):
            _headline_axes(result, axes if index == 0 else None, axes if index == 1 else None)
            pictures.append(_svg(figure, f"{name}-headline{index}", f"{what} of each draft with its interval"))
    return pictures


def grouped_svg(
    groups: Mapping[str, Mapping[str, Interval]],
    colours: Mapping[str, str],
    title: str,
    name: str,
    line: float | None = None,
) -> str:
    """Dots with intervals: a band a group (a task), in it a row a series (a draft); ``line`` is a dashed reference."""
    series = list(dict.fromkeys(key for figures in groups.values() for key in figures))
    pitch = 0.8 / max(len(series), 1)
    inches = 1.05 + sum(0.12 + 0.2 * len(series) for _ in groups)
    with _figure(WIDTH, inches) as (figure, axes):
        for band, figures in enumerate(groups.values()):
            for key, interval in figures.items():
                row = band + (series.index(key) - (len(series) - 1) / 2) * pitch
                if not missing(interval.low):
                    axes.plot(
                        [interval.low, interval.high], [row] * 2, color=colours[key], linewidth=3, alpha=0.45,
                        solid_capstyle="round",
                    )  # fmt: skip
                marker = MARKERS[series.index(key) % len(MARKERS)]
                axes.plot(interval.value, row, marker, color=colours[key], markersize=6)
        for key in series:
            axes.plot([], [], MARKERS[series.index(key) % len(MARKERS)], color=colours[key], label=key)
        if line is not None:
            axes.axvline(line, color=PHASES["other"], linestyle="--", linewidth=1.2)
        axes.set_yticks(range(len(groups)), [_short(group) for group in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        for band in range(1, len(groups)):
            axes.axhline(band - 0.5, color=GRID, linewidth=0.8)
        axes.margins(x=0.08)
        axes.set_title(title)
        figure.legend(loc="outside lower right", ncols=min(3, len(series)), handletextpad=0.2, columnspacing=1.0)
        return _svg(figure, name, f"{title}, by group, with intervals: {_spoken(groups)}")


def _short(text: str, limit: int = 18) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _spoken(groups: Mapping[str, Mapping[str, Interval]]) -> str:
    return "; ".join(
        f"{group}: " + ", ".join(f"{key} {number(figure.value)}" for key, figure in figures.items())
        for group, figures in groups.items()
    )


def lines_svg(
    curves: Mapping[str, Sequence[tuple[float, Interval]]],
    colours: Mapping[str, str],
    title: str,
    xlabel: str,
    name: str,
) -> str:
    """One line a series over a base-2 axis (concurrency), with its interval as a shade."""
    with _figure(WIDTH, 2.9) as (figure, axes):
        for marker, (key, points) in zip(MARKERS * len(curves), curves.items(), strict=False):
            at = [x for x, _ in points]
            axes.plot(at, [y.value for _, y in points], f"{marker}-", color=colours[key], label=key)
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
        return _svg(figure, name, f"{title} over {xlabel}: {spoken}")


def headline_figure_png(result: BenchResult) -> bytes:
    """The headline picture on white, for places that show no SVG."""
    columns = 2 if speed_figures(result)[3] else 1
    height = 0.95 + 0.55 * len(result.drafts)
    with _figure(columns * WIDTH, height, columns, ink="#1b1f24", grid="#d5d9de") as (figure, axes):
        _headline_axes(result, *(axes if columns == 2 else (axes, None)))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, transparent=False, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def acceptance_svgs(result: BenchResult, name: str) -> list[str]:
    """Acceptance by position: given that the position was reached, and over all rounds."""
    colours, pictures = series_colours(list(result.drafts)), []
    titles = {"conditional": "accepted, given that it was reached", "unconditional": "accepted, of all rounds"}
    for kind, title in titles.items():
        curves = {key: getattr(draft, f"acceptance_{kind}") for key, draft in result.drafts.items()}
        if not any(curves.values()):
            continue
        with _figure(WIDTH, 2.9) as (figure, axes):
            for marker, (key, curve) in zip(MARKERS * len(curves), curves.items(), strict=False):
                values = [float("nan") if v is None else v for v in curve]
                axes.plot(range(1, len(curve) + 1), values, f"{marker}-", color=colours[key], label=key)
            axes.set_ylim(0, 1)
            axes.set_xticks(range(1, max(map(len, curves.values())) + 1))
            axes.set_xlabel("drafted position")
            axes.set_title(title)
            axes.legend()
            pictures.append(_svg(figure, f"{name}-{kind}", f"Share of draft tokens {title}, by position"))
    return pictures


def time_svg(result: BenchResult, name: str) -> str | None:
    """One bar a draft: what a round costs, and (in plain tokens) a tick at tau, the tokens it yields."""
    costs = round_costs(result)
    if not costs:
        return None
    relative = result.plain is not None
    with _figure(WIDTH, 1.45 + 0.42 * len(costs)) as (figure, axes):
        for row, cost in enumerate(costs.values()):
            left = 0.0
            for phase, colour in PHASES.items():
                width = getattr(cost, phase)
                axes.barh(row, width, 0.55, left=left, color=colour, label=phase if row == 0 else None)
                left += width
            if relative:
                label = "yield, \N{GREEK SMALL LETTER TAU}" if row == 0 else None
                axes.plot([cost.tau] * 2, [row - 0.38, row + 0.38], color=INK, linewidth=2, label=label)
        axes.set_yticks(range(len(costs)), [_short(key) for key in costs])
        axes.set_ylim(len(costs) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.06 * max(max(cost.total, cost.tau if relative else 0) for cost in costs.values()))
        unit = "tokens of plain decoding" if relative else "milliseconds"
        axes.set_xlabel(f"cost of a round, in {unit}")
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: labels[i] not in PHASES)
        figure.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="outside upper left",
            ncols=3,
            handlelength=1.0,
            columnspacing=1.8,
        )
        about = "; ".join(
            f"{key}: a round costs {number(cost.total)} {unit} and yields {number(cost.tau)} tokens"
            for key, cost in costs.items()
        )
        return _svg(figure, f"{name}-time", about)


def training_svgs(points: Sequence[CurvePoint], stale: tuple[str, float] | None) -> list[str]:
    """Training loss and held-out acceptance length over tokens seen, and ``stale`` (label, tau) as a dashed line."""
    pictures = []
    by_tokens = points[-1].tokens > 0
    label, at = (
        ("supervised tokens (thousands)", [p.tokens / 1000 for p in points])
        if by_tokens
        else ("step", [float(p.step) for p in points])
    )
    with _figure(WIDTH, 2.7) as (figure, axes):
        # a line through one point is nothing at all
        axes.plot(at, [p.loss for p in points], "-" if at[1:] else "o", color=COLOURS["aligned"], linewidth=1.4)
        axes.set_title("training loss")
        axes.set_xlabel(label)
        pictures.append(_svg(figure, "curve-loss", "Training loss"))
    held = [(x, p.heldout_tau) for x, p in zip(at, points, strict=True) if p.heldout_tau is not None]
    if held:
        with _figure(WIDTH, 2.7) as (figure, axes):
            axes.plot(*zip(*held, strict=True), "o-", color=COLOURS["aligned"], label="in training")
            if stale is not None:
                axes.axhline(stale[1], color=COLOURS["stale"], linestyle="--", label=stale[0])
            axes.legend()
            axes.set_title("held-out acceptance length \N{GREEK SMALL LETTER TAU}")
            axes.set_xlabel(label)
            pictures.append(_svg(figure, "curve-tau", "Held-out acceptance length during training"))
    return pictures
