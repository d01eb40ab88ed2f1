"""What a check found, for the terminal, a notebook and a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table

from redraft.adaptation.check.causes import CAUSES, NOTHING
from redraft.adaptation.check.static import Static
from redraft.shown import Shown, lines, told

SCHEMA = "redraft.check/1"
# Trials that a table shows.
SHOWN_TRIALS = 8


@dataclass(frozen=True)
class Finding:
    """A cause by its id (:mod:`redraft.adaptation.check.causes`), what shows it here, and the command that mends it."""

    cause: str
    evidence: str
    mend: str

    @property
    def words(self) -> str:
        """What is wrong."""
        return CAUSES[self.cause].words


@dataclass
class CheckResult(Shown):
    """``findings`` with the likeliest cause first; none where nothing wrong was found.

    ``here`` is what this engine accepts of the draft, ``there`` what a server does, each with tau and acceptance by
    position; ``trials`` what changed one at a time would be accepted.
    """

    draft: str
    target: str
    findings: list[Finding] = field(default_factory=list)
    static: Static = field(default_factory=Static)
    here: dict[str, Any] | None = None
    there: dict[str, Any] | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def cause(self) -> str | None:
        """The id of the likeliest cause."""
        return self.findings[0].cause if self.findings else None

    @property
    def verdict(self) -> str:
        """In words."""
        return self.findings[0].words if self.findings else NOTHING

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values (schema ``redraft.check/1``, docs/acceptance.md)."""
        return {
            "schema": SCHEMA,
            "draft": self.draft,
            "target": self.target,
            "cause": self.cause,
            "verdict": self.verdict,
            "findings": [asdict(one) | {"words": one.words} for one in self.findings],
            "reader": self.static.reader,
            "reading": [asdict(line) for line in self.static.lines],
            "stops": self.static.stops,
            "here": self.here,
            "there": self.there,
            "trials": self.trials,
            "notes": self.notes,
        }

    def __rich__(self) -> Group:
        parts: list[Any] = []
        if self.static.reader:
            parts.append(self._reading())
        if self.here:
            parts.append(self._rates())
        if self.trials:
            parts.append(self._trials())
        parts += [lines(f"note: {note}") for note in self.notes]
        return Group(*parts, self._panel())

    # -- parts -----------------------------------------------------------------------------------------------------
    def _reading(self) -> Table:
        apart = sum(line.differs for line in self.static.lines)
        title = f"what {self.static.reader} reads: {apart} thing{'' if apart == 1 else 's'} otherwise"
        title = f"{self.static.reader} does not load this file" if self.static.stops else title
        table = Table(title=title, title_justify="left")
        for name in ("what", "as it was trained", self.static.reader, "on whose word"):
            table.add_column(name)
        for line in sorted(self.static.lines, key=lambda line: not line.differs):
            cells = (line.what, line.ours, line.theirs, line.word)
            table.add_row(*map(told, cells), style="yellow" if line.differs else None)
        return table

    def _rates(self) -> Table:
        sides = {"here": self.here, "server": self.there}
        most = max(len(side["acceptance_conditional"]) for side in sides.values() if side)
        table = Table(title="accepted, given that the position was reached", title_justify="left")
        for name in ("", "tau", *(str(j) for j in range(1, most + 1))):
            table.add_column(name, justify="right" if name else "left")
        for name, side in sides.items():
            if side:
                shown = ["-" if rate is None else f"{rate:.2f}" for rate in side["acceptance_conditional"]]
                table.add_row(name, _tau(side["tau"]), *shown)
        return table

    def _trials(self) -> Table:
        table = Table(title="with one thing changed", title_justify="left")
        table.add_column("change")
        for name in ("tau", "gain"):
            table.add_column(name, justify="right")
        for trial in self.trials[:SHOWN_TRIALS]:
            gain = f"{trial['gain']:+.2f}"
            table.add_row(told(trial["what"]), f"{trial['tau']:.2f}", f"[bold]{gain}[/bold]" if trial["sure"] else gain)
        return table

    def _panel(self) -> Panel:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column()
        for number, one in enumerate(self.findings):
            rows = {"cause" if not number else "and": one.words, "shown by": one.evidence, "mend": one.mend}
            for key, value in rows.items():
                grid.add_row(key, told(value))
        if not self.findings:
            grid.add_row("", NOTHING)
        colour = "yellow" if self.findings else "green"
        title = f"[bold]{told(self.draft)}[/bold]"
        return Panel(grid, title=title, title_align="left", expand=False, border_style=colour)


def _tau(tau: Mapping[str, float]) -> str:
    return f"{tau['value']:.2f} ({tau['low']:.2f} to {tau['high']:.2f})"
