"""What the Python API gives back, and the figures of the page as tables for the terminal."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markdown import Markdown
from rich.panel import Panel
from rich.table import Table

from redraft.reports import format as form
from redraft.reports import sections
from redraft.reports.load import BenchResult, Costs, Interval, Summary, parse
from redraft.shown import Shown, lines, told, value_words


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
    said = ["95% intervals over prompts; speed-up over the fastest plain decoding"]
    if sections.types_differ(bench):
        said.append("each in its fastest data type; texts are compared with plain decoding in the draft's own")
    said += [*filter(None, [sections.others_apart(bench)]), *map(told, sections.slower(bench))]
    title = told(f"{bench.setup.target}: {sections.sampler_line(bench)}")
    table = _table(title, ["draft"], figures, caption="\n".join(said))
    for kind, rate in bench.plain.rates.items() if bench.plain else ():
        assert bench.plain is not None
        relative = form.times(bench.plain.over_fastest(kind))
        table.add_row(
            told(f"plain {kind}"), "1.00", "1.00", form.DASH, _cell(rate, 1), relative, form.DASH, style="dim"
        )
    for name, draft in bench.drafts.items():
        compared = bench.setup.prompts if draft.compared is None else draft.compared
        same = form.DASH if draft.identical_to_plain is None else f"{draft.identical_to_plain} of {compared}"
        table.add_row(
            told(name) + (f" [dim]{told(draft.dtype)}[/dim]" if draft.dtype else ""),
            _cell(draft.tau_pooled, 2),
            _cell(draft.tau_macro, 2),
            _cell(draft.alpha, 3),
            _cell(draft.tokens_per_second, 1),
            _cell(draft.speedup, 2, "\N{MULTIPLICATION SIGN}"),
            same,
        )
    return table


def acceptance_table(result: Mapping[str, Any]) -> Table:
    """Acceptance by drafted position: given that it was reached, and of all rounds."""
    bench = parse(BenchResult, result, "benchmark result")
    positions = max((len(draft.acceptance_unconditional) for draft in bench.drafts.values()), default=0)
    table = _table("acceptance by position", ["draft", "of"], [str(j) for j in range(1, positions + 1)])
    for name, draft in bench.drafts.items():
        table.add_row(told(name), "rounds that reach it", *(form.number(v) for v in draft.acceptance_conditional))
        table.add_row("", "all rounds", *(form.number(v) for v in draft.acceptance_unconditional))
    return table


def task_table(result: Mapping[str, Any]) -> Table | None:
    """Acceptance length and speed-up of every draft by task; None when the result was not divided by task."""
    found = sections.tasks(parse(BenchResult, result, "benchmark result"))
    if not found:
        return None
    table = _table("by task", ["task", "draft"], ["prompts", "tau", "speed-up", "tokens/s"])
    for task, drafts in found.items():
        for index, (name, figures) in enumerate(drafts.items()):
            table.add_row(
                told(task) if index == 0 else "",
                told(name),
                str(figures.prompts),
                _cell(figures.tau_pooled, 2),
                _cell(figures.speedup, 2, "\N{MULTIPLICATION SIGN}"),
                _cell(figures.tokens_per_second, 1),
            )
    return table


# Of a probe's action: nothing to do, worth a try, worth doing.
PROBE_COLOURS = {"leave": "green", "try": "cyan", "adapt": "yellow"}


def probe_panel(verdict: str, figures: Mapping[str, str], action: str) -> Panel:
    """What `redraft probe` found: a verdict on top, one line a figure below; ``action`` gives the colour."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for key, value in figures.items():
        grid.add_row(key, told(value))
    title, colour = f"[bold]{verdict}[/bold]", PROBE_COLOURS[action]
    return Panel(grid, title=title, title_align="left", expand=False, border_style=colour)


def ledger_table(ledger: Mapping[str, Any]) -> Table:
    """The cost ledger (its JSON) with its total. Raises ``UserError`` when it is not one."""
    costs = parse(Costs, ledger, "cost ledger")
    heads = {"time": "time", "tokens": "tokens", "flops": "compute", "memory": "peak memory", "written": "written"}
    table = _table("cost", ["stage"], list(heads.values()), show_footer=True)
    keys, total = ["stage", *heads], sections.ledger_cells(sections.total_of(costs))
    for key, column in zip(keys, table.columns, strict=True):
        column.footer = total[key]
    for cells in map(sections.ledger_cells, costs.stages):
        table.add_row(*(told(cells[key]) for key in keys))
    return table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The quickstart's outcome: acceptance length and speed-up of the stale, the aligned and the full draft."""
    facts = parse(Summary, summary, "summary")
    title, parts, share = "stale draft in, aligned draft out", [], sections.recovery(facts)
    if share is not None:
        parts.append(f"{form.percent(share)} of the gain of training every weight")
    if facts.trained_fraction_of_full is not None:
        parts.append(f"with {form.percent(facts.trained_fraction_of_full, 1)} of the parameters")
    if facts.minutes is not None:
        parts.append(f"in {form.number(facts.minutes, 1)} minutes")
    caption = ", ".join(parts) + (f"\nfull: {told(facts.tau_full_from)}" if facts.tau_full_from else "")
    table = _table(title, ["draft"], ["tau", "speed-up"], min_width=72, caption=caption)
    for name in dict.fromkeys([*facts.tau, *facts.speedup]):
        table.add_row(told(name), form.number(facts.tau.get(name)), form.times(facts.speedup.get(name)))
    return table


# -- what the API gives back -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Benchmark(Shown):
    """A benchmark in ``path``. ``figures`` is the JSON in it: ``drafts`` by name, ``plain``, ``gains``, ``setup``."""

    path: Path
    figures: dict[str, Any] = field(repr=False)

    def __rich__(self) -> Group:
        parts: list[Any] = [bench_table(self.figures)]
        if self.figures["drafts"]:
            parts.append(acceptance_table(self.figures))
        parts += filter(None, [task_table(self.figures)])
        if picked := self.figures["setup"].get("picked"):
            parts.append(lines(f"shape auto: {picked}"))
        return Group(*parts)


@dataclass(frozen=True)
class Adapted(Shown):
    """A finished run in ``folder``: the ``draft`` (merged, in redraft's format), ``exports`` by format, the ``page``.

    ``private`` holds only what was trained; None where that is every weight. ``ledger`` is what each stage cost.
    Without benchmark prompts there are neither ``benchmark`` nor ``page``.
    """

    folder: Path
    draft: Path
    private: Path | None
    exports: dict[str, Path]
    page: Path | None
    benchmark: Benchmark | None
    ledger: dict[str, Any] = field(repr=False)

    def __rich__(self) -> Group:
        where = lines(f"draft: {self.draft}" + (f"; page: {self.page}" if self.page else ""))
        measured = self.benchmark.__rich__().renderables if self.benchmark else ()
        return Group(*measured, ledger_table(self.ledger), where)


@dataclass(frozen=True)
class Trained(Shown):
    """A trained draft in the folder ``draft``; ``private`` holds only what was trained, where that is a part.

    ``tau`` is the acceptance length on held-out responses, bonus token included, ``start_tau`` that of the old draft
    (None for a new one).
    """

    draft: Path
    private: Path | None
    tau: float
    start_tau: float | None

    def __rich__(self) -> Any:
        before = "" if self.start_tau is None else f" (before training {self.start_tau:.2f})"
        return lines(f"held-out tau {self.tau:.2f}{before}; draft: {self.draft}")


@dataclass(frozen=True)
class Merged(Shown):
    """A dense draft in ``folder``. ``method`` is what trained the part of it."""

    folder: Path
    parameters: int
    method: str | None

    def __rich__(self) -> Any:
        return lines(f"{self.folder}: {self.parameters:,} parameters, method {self.method}")


# How a value came about: in colours, the surprising ones the louder.
HOW_COLOURS = {"read": "green", "derived": "cyan", "defaulted": "yellow", "target": "cyan", "dropped": "red"}


@dataclass(frozen=True)
class Imported(Shown):
    """A draft in ``folder`` that another trainer wrote, in redraft's own format.

    ``entries`` say of each value what it is, how it came about and on whose word; ``notes`` what to know of it.
    """

    folder: Path
    source: str
    family: str
    trainer: str
    parameters: int
    bytes: int
    entries: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "folder": str(self.folder), "entries": list(self.entries), "notes": list(self.notes)}

    def __rich__(self) -> Any:
        table = _table(f"{self.source}, as {self.trainer} means it", ["what", "value", "how", "on whose word"], [])
        for entry in self.entries:
            how = entry["how"]
            shown = form.DASH if entry["value"] is None else told(value_words(entry["value"]))
            table.add_row(told(entry["what"]), shown, f"[{HOW_COLOURS[how]}]{how}[/]", told(entry["word"]))
        size = f"{self.folder}: {self.family} draft of {self.parameters:,} parameters, {self.bytes / 1e6:.1f} MB"
        if not self.entries:
            return lines(*(f"note: {note}" for note in self.notes), f"{self.source} was taken as it is", size)
        return Group(table, lines(*(f"note: {note}" for note in self.notes), size))


@dataclass(frozen=True)
class Page(Shown):
    """A page that needs nothing else, in the file ``path``; a notebook shows it as it is."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __rich__(self) -> Any:
        return lines(str(self.path))

    def _repr_html_(self) -> str:
        text = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{text}" style="width:100%;height:800px;border:0"></iframe>'


@dataclass(frozen=True)
class Study(Shown):
    """A study: the ``results`` file, its ``tables`` (Markdown) and the figures in them."""

    results: Path
    tables: Path
    figures: dict[str, Any] = field(repr=False)

    def __rich__(self) -> Markdown:
        return Markdown(self.tables.read_text(encoding="utf-8"))
