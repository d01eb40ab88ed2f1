"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere.

Library code takes a :class:`Progress` (or nothing) and calls ``update``; only the command line makes one, so that
the library neither prints nor imports rich.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

from redraft.errors import printable

LINE_SECONDS = 10.0
# Work that takes longer than this says so at once, and not only after LINE_SECONDS.
FIRST_SECONDS = 2.0
# Characters of a name beside the figures.
LONGEST = 40


class Progress(Protocol):
    """``update(done, **fields)``: the amount done so far, and anything else worth a reader's eye."""

    def update(self, done: int, **fields: Any) -> None: ...


def fields_text(fields: dict[str, Any]) -> str:
    """Fields in one line: ``loss 1.234  held-out tau 2.10``. Underscores are spaces, absent figures are left out."""
    words = []
    for name, value in fields.items():
        if value is not None:
            shown = f"{value:.3f}" if isinstance(value, float) else str(value)
            shown = shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "\u2026"
            words.append(f"{name.replace('_', ' ').replace('heldout', 'held-out')} {shown}")
    return printable("  ".join(words))


def clock(seconds: float) -> str:
    """``3:07`` or ``1:02:09``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Meter:
    """Rate and time left.

    The rate counts from the last report before anything advanced: a resumed run does not flatter itself, and what goes
    before the work that is counted does not hold its rate down.
    """

    def __init__(self, total: int | None, now: Callable[[], float] = time.monotonic) -> None:
        self.total, self.now = total, now
        self.first: tuple[float, int] | None = None
        self.done = 0

    def update(self, done: int) -> None:
        self.done = done
        if self.first is None or done <= self.first[1]:
            self.first = (self.now(), done)

    @property
    def rate(self) -> float | None:
        """Units a second, or ``None`` before there are two reports."""
        if self.first is None or self.done <= self.first[1] or self.now() <= self.first[0]:
            return None
        return (self.done - self.first[1]) / (self.now() - self.first[0])

    def text(self, unit: str) -> str:
        """``840 tokens/s, 3:07 left``, as far as it is known; without a rate where the amount has no unit (``""``)."""
        rate = self.rate
        if rate is None:
            return ""
        words = [f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"] if unit else []
        if self.total:
            words.append(f"{clock(max(0, self.total - self.done) / rate)} left")
        return ", ".join(words)


class PlainProgress:
    """A line soon, then at most one every ``every`` seconds, for logs and pipes.

    It tells the rate of the amount done, and that of the tokens where the amount counts something else.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str,
        stream: IO[str],
        every: float = LINE_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.unit, self.stream, self.every, self.now = description, unit, stream, every, now
        self.meter, self.tokens = Meter(total, now), Meter(None, now)
        self.last: dict[str, Any] = {}
        self.due = now() + min(FIRST_SECONDS, every)

    def update(self, done: int, **fields: Any) -> None:
        self.meter.update(done)
        self.last.update(fields)
        if fields.get("tokens") is not None:
            self.tokens.update(fields["tokens"])
        self.show()

    def show(self) -> None:
        """Called at every report."""
        if self.now() >= self.due:
            self.write()

    @property
    def rate(self) -> str:
        return ", ".join(filter(None, [self.tokens.text("tokens"), self.meter.text(self.unit)]))

    def write(self, ended: bool = False) -> None:
        """The line as it stands now."""
        self.due = self.now() + self.every
        done, total = self.meter.done, self.meter.total
        if ended and self.meter.first is None:
            share = "done"  # all of it was there already, or nobody counts it
        elif total:
            share = f"{100 * done / total:.0f}%"
        else:
            share = f"{done:,} {self.unit}" if done else "begun"
        parts = [f"{self.description}: {share}", self.rate, fields_text(self.last)]
        print("  ".join(filter(None, parts)), file=self.stream, flush=True)


class _BarProgress(PlainProgress):
    """Drives one task of a rich bar."""

    bar: Any
    task: Any

    def show(self) -> None:
        self.bar.update(self.task, completed=self.meter.done, rate=self.rate, fields=fields_text(self.last))


def tell(text: str) -> None:
    """A line for a person, on standard error, where bars make room for it."""
    print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def progress_bar(
    description: str, total: int | None = None, unit: str = "tokens", stream: IO[str] | None = None
) -> Iterator[Progress]:
    """A progress for the body of ``with``: a bar when ``stream`` (standard error) is a terminal, else plain lines.

    ``total`` is the amount that ``update`` counts up to, in ``unit`` (``""``: a share of the work, whose rate would say
    nothing); ``None`` when it is not known.
    """
    stream = stream if stream is not None else sys.stderr
    if not stream.isatty():
        plain = PlainProgress(description, total, unit, stream)
        yield plain
        plain.write(ended=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = [SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(bar_width=30), TaskProgressColumn()]
    columns += [TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[fields]}", style="cyan", markup=False)]
    with RichProgress(*columns, console=Console(file=stream)) as bar:
        shown = _BarProgress(description, total, unit, stream)
        shown.bar, shown.task = bar, bar.add_task(description, total=total, rate="", fields="")
        yield shown
