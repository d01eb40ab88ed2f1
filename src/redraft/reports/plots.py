"""The pictures of a benchmark and of a training: intervals, curves and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redraft.reports.costs import round_costs
from redraft.reports.drawing import (
    COLOURS,
    GRID,
    INK,
    MARKERS,
    PHASES,
    WIDTH,
    dot,
    figure,
    png,
    rows_named,
    series_colours,
    svg,
)
from redraft.reports.format import missing, number
from redraft.reports.load import BenchResult, CurvePoint, Interval


def _dots(axes: Any, entries: list[tuple[str, str, Interval]], title: str, digits: int, unit: str = "") -> None:
    """A dot with its interval a row, the first on top, each with its figure beside it."""
    for row, (_, colour, found) in enumerate(entries):
        dot(axes, row, found, colour, MARKERS[row % len(MARKERS)], 8)
        words, place = f"{found.value:.{digits}f}{unit}", (found.value, row)
        axes.annotate(words, place, (0, 9), textcoords="offset points", ha="center", fontweight="bold")
    rows_named(axes, [name for name, _, _ in entries], 0.5, 0.75)
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
        _dots(speed_axes, [(name, colours[name], found) for name, found in figures.items()], title, digits, unit)


def headline_svgs(result: BenchResult, name: str) -> list[str]:
    """Acceptance length and speed with intervals: two pictures that a narrow page stacks."""
    height = 0.95 + 0.55 * len(result.drafts)
    pictures = []
    for index, what in enumerate(("acceptance length", "speed")):
        if index and not speed_figures(result)[3]:
            continue
        with figure(WIDTH, height) as (made, axes):
            _headline_axes(result, axes if index == 0 else None, axes if index == 1 else None)
            pictures.append(svg(made, f"{name}-headline{index}", f"{what} of each draft with its interval"))
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
    with figure(WIDTH, inches) as (made, axes):
        for band, figures in enumerate(groups.values()):
            for key, interval in figures.items():
                row = band + (series.index(key) - (len(series) - 1) / 2) * pitch
                dot(axes, row, interval, colours[key], MARKERS[series.index(key) % len(MARKERS)], 6)
        for key in series:
            axes.plot([], [], MARKERS[series.index(key) % len(MARKERS)], color=colours[key], label=key)
        if line is not None:
            axes.axvline(line, color=PHASES["other"], linestyle="--", linewidth=1.2)
        rows_named(axes, [_short(group) for group in groups], 0.5, 0.5)
        for band in range(1, len(groups)):
            axes.axhline(band - 0.5, color=GRID, linewidth=0.8)
        axes.margins(x=0.08)
        axes.set_title(title)
        made.legend(loc="outside lower right", ncols=min(3, len(series)), handletextpad=0.2, columnspacing=1.0)
        return svg(made, name, f"{title}, by group, with intervals: {_spoken(groups)}")


def _short(text: str, limit: int = 18) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _spoken(groups: Mapping[str, Mapping[str, Interval]]) -> str:
    return "; ".join(
        f"{group}: " + ", ".join(f"{key} {number(found.value)}" for key, found in figures.items())
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
    with figure(WIDTH, 2.9) as (made, axes):
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
        return svg(made, name, f"{title} over {xlabel}: {spoken}")


def headline_figure_png(result: BenchResult) -> bytes:
    """The headline picture on white, for places that show no SVG."""
    columns = 2 if speed_figures(result)[3] else 1
    height = 0.95 + 0.55 * len(result.drafts)
    with figure(columns * WIDTH, height, columns, white=True) as (made, axes):
        _headline_axes(result, *(axes if columns == 2 else (axes, None)))
        return png(made, 160)


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
                axes.plot(range(1, len(curve) + 1), values, f"{marker}-", color=colours[key], label=key)
            axes.set_ylim(0, 1)
            axes.set_xticks(range(1, max(map(len, curves.values())) + 1))
            axes.set_xlabel("drafted position")
            axes.set_title(title)
            axes.legend()
            pictures.append(svg(made, f"{name}-{kind}", f"Share of draft tokens {title}, by position"))
    return pictures


def time_svg(result: BenchResult, name: str) -> str | None:
    """One bar a draft: what a round costs, and (in plain tokens) a tick at tau, the tokens it yields."""
    costs = round_costs(result)
    if not costs:
        return None
    relative = result.plain is not None
    with figure(WIDTH, 1.45 + 0.42 * len(costs)) as (made, axes):
        for row, cost in enumerate(costs.values()):
            left = 0.0
            for phase, colour in PHASES.items():
                width = getattr(cost, phase)
                axes.barh(row, width, 0.55, left=left, color=colour, label=phase if row == 0 else None)
                left += width
            if relative:
                label = "yield, \N{GREEK SMALL LETTER TAU}" if row == 0 else None
                axes.plot([cost.tau] * 2, [row - 0.38, row + 0.38], color=INK, linewidth=2, label=label)
        rows_named(axes, [_short(key) for key in costs], 0.55, 0.55)
        axes.set_xlim(0, 1.06 * max(max(cost.total, cost.tau if relative else 0) for cost in costs.values()))
        unit = "tokens of plain decoding" if relative else "milliseconds"
        axes.set_xlabel(f"cost of a round, in {unit}")
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: labels[i] not in PHASES)
        made.legend(
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
        return svg(made, f"{name}-time", about)


def training_svgs(points: Sequence[CurvePoint], stale: tuple[str, float] | None) -> list[str]:
    """Training loss and held-out acceptance length over tokens seen, and ``stale`` (label, tau) as a dashed line."""
    pictures = []
    by_tokens = points[-1].tokens > 0
    label, at = (
        ("supervised tokens (thousands)", [p.tokens / 1000 for p in points])
        if by_tokens
        else ("step", [float(p.step) for p in points])
    )
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
                axes.axhline(stale[1], color=COLOURS["stale"], linestyle="--", label=stale[0])
            axes.legend()
            axes.set_title("held-out acceptance length \N{GREEK SMALL LETTER TAU}")
            axes.set_xlabel(label)
            pictures.append(svg(made, "curve-tau", "Held-out acceptance length during training"))
    return pictures
