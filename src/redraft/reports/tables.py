"""The same figures as the page, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from redraft.reports import format as form
from redraft.reports.load import BenchResult, Costs, Interval, Summary, parse
from redraft.reports.sections import (
    identical,
    ledger_cells,
    others_apart,
    recovery,
    sampler_line,
    slower,
    tasks,
    total_of,
    types_differ,
)


def _cell(interval: Interval | None, digits: int, unit: str = "") -> str:
    if interval is None:
        return form.DASH
    ends = form.bounds(interval, digits)
    return f"{form.number(interval.value, digits)}{unit}" + (f" [dim]({ends})[/dim]" if ends else "")


def _table(title: str, left: Sequence[str], right: Sequence[str], **how: Any) -> Table:
    """A table whose first column is bold; figures stand on the right."""
    table = Table(title=title, title_justify="left", caption_justify="left", **how)
    for number, name in enumerate(left):
        table.add_column(name, style=None if number else "bold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def bench_table(result: Mapping[str, Any]) -> Table:
    """All drafts of a benchmark result (its JSON) with 95% intervals.

    Raises ``UserError`` when a field is missing.
    """
    bench = parse(BenchResult, result, "benchmark result")
    figures = ("tau", "tau macro", "alpha", "tokens/s", "speed-up", "same as plain")
    title = f"{bench.setup.target}: {sampler_line(bench)}"
    table = _table(title, ["draft"], figures, caption=_bench_caption(bench))
    for kind, rate in bench.plain.rates.items() if bench.plain else ():
        assert bench.plain is not None
        relative = form.times(bench.plain.over_fastest(kind))
        table.add_row(f"plain {kind}", "1.00", "1.00", form.DASH, _cell(rate, 1), relative, form.DASH, style="dim")
    for name, draft in bench.drafts.items():
        table.add_row(
            escape(name) + (f" [dim]{draft.dtype}[/dim]" if draft.dtype else ""),
            _cell(draft.tau_pooled, 2),
            _cell(draft.tau_macro, 2),
            _cell(draft.alpha, 3),
            _cell(draft.tokens_per_second, 1),
            _cell(draft.speedup, 2, "\N{MULTIPLICATION SIGN}"),
            identical(draft, bench.setup.prompts),
        )
    return table


def _bench_caption(bench: BenchResult) -> str:
    lines = ["95% intervals over prompts; speed-up over the fastest plain decoding", *map(escape, slower(bench))]
    if apart := others_apart(bench):
        lines.insert(1, apart)
    if types_differ(bench):
        lines.insert(1, "each in its fastest data type; texts are compared with plain decoding in the draft's own")
    return "\n".join(lines)


def acceptance_table(result: Mapping[str, Any]) -> Table:
    """Acceptance by drafted position: given that it was reached, and of all rounds."""
    bench = parse(BenchResult, result, "benchmark result")
    positions = max((len(draft.acceptance_unconditional) for draft in bench.drafts.values()), default=0)
    table = _table("acceptance by position", ["draft", "of"], [str(j) for j in range(1, positions + 1)])
    for name, draft in bench.drafts.items():
        table.add_row(name, "rounds that reach it", *(form.number(v) for v in draft.acceptance_conditional))
        table.add_row("", "all rounds", *(form.number(v) for v in draft.acceptance_unconditional))
    return table


def task_table(result: Mapping[str, Any]) -> Table | None:
    """Acceptance length and speed-up of every draft by task; None when the result was not divided by task."""
    found = tasks(parse(BenchResult, result, "benchmark result"))
    if not found:
        return None
    table = _table("by task", ["task", "draft"], ["prompts", "tau", "speed-up", "tokens/s"])
    for task, drafts in found.items():
        for index, (name, figures) in enumerate(drafts.items()):
            table.add_row(
                escape(task) if index == 0 else "",
                escape(name),
                str(figures.prompts),
                _cell(figures.tau_pooled, 2),
                _cell(figures.speedup, 2, "\N{MULTIPLICATION SIGN}"),
                _cell(figures.tokens_per_second, 1),
            )
    return table


# Of a probe's action: nothing to do, worth a try, worth doing.
PROBE_COLOURS = {"leave": "green", "try": "cyan", "adapt": "yellow"}


def probe_panel(verdict: str, lines: Mapping[str, str], action: str) -> Panel:
    """What `redraft probe` found: a verdict on top, one line a figure below; ``action`` gives the colour."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for key, value in lines.items():
        grid.add_row(key, escape(value))
    return Panel(
        grid,
        title=f"[bold]{verdict}[/bold]",
        title_align="left",
        expand=False,
        border_style=PROBE_COLOURS[action],
    )


def ledger_table(ledger: Mapping[str, Any]) -> Table:
    """The cost ledger (its JSON) with its total. Raises ``UserError`` when it is not one."""
    costs = parse(Costs, ledger, "cost ledger")
    heads = {"time": "time", "tokens": "tokens", "flops": "compute", "memory": "peak memory", "written": "written"}
    table = _table("cost", ["stage"], list(heads.values()), show_footer=True)
    keys, total = ["stage", *heads], ledger_cells(total_of(costs))
    for key, column in zip(keys, table.columns, strict=True):
        column.footer = total[key]
    for cells in map(ledger_cells, costs.stages):
        table.add_row(*(cells[key] for key in keys))
    return table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The quickstart's outcome: acceptance length and speed-up of the stale, the aligned and the full draft."""
    facts = parse(Summary, summary, "summary")
    title, caption = "stale draft in, aligned draft out", _summary_caption(facts)
    table = _table(title, ["draft"], ["tau", "speed-up"], min_width=72, caption=caption)
    for name in dict.fromkeys([*facts.tau, *facts.speedup]):
        table.add_row(name, form.number(facts.tau.get(name)), form.times(facts.speedup.get(name)))
    return table


def _summary_caption(facts: Summary) -> str:
    parts = []
    share = recovery(facts)
    if share is not None:
        parts.append(f"{form.percent(share)} of the gain of training every weight")
    if facts.trained_fraction_of_full is not None:
        parts.append(f"with {form.percent(facts.trained_fraction_of_full, 1)} of the parameters")
    if facts.minutes is not None:
        parts.append(f"in {form.number(facts.minutes, 1)} minutes")
    text = ", ".join(parts)
    return f"{text}\nfull: {facts.tau_full_from}" if facts.tau_full_from else text
