"""What the Python API gives back, with the tables and pages of this room to show it."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markdown import Markdown

from redraft.reports.tables import acceptance_table, bench_table, ledger_table, task_table
from redraft.shown import Shown, lines


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
            parts.append(lines(f"gamma=auto: {picked}"))
        return Group(*parts)


@dataclass(frozen=True)
class Adapted(Shown):
    """A finished run in ``folder``: the ``draft`` (merged, in redraft's format), ``exports`` by format, the ``page``.

    ``private`` holds only what was trained; None where that is every weight. ``ledger`` is what each stage cost.
    """

    folder: Path
    draft: Path
    private: Path | None
    exports: dict[str, Path]
    page: Path
    benchmark: Benchmark
    ledger: dict[str, Any] = field(repr=False)

    def __rich__(self) -> Group:
        where = lines(f"draft: {self.draft}; page: {self.page}")
        return Group(*self.benchmark.__rich__().renderables, ledger_table(self.ledger), where)


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
