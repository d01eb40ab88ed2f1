"""What every run has: a log of its stages, and a run directory with settings, a target and exports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from redraft import provenance
from redraft.adaptation.merged_target import served
from redraft.adaptation.models import open_target
from redraft.data.store import Row, read_rows
from redraft.data.template import template_record
from redraft.drafts.base import Draft
from redraft.drafts.formats.base import check_export
from redraft.progress import Progress, progress_bar
from redraft.provenance import Entry, Ledger
from redraft.registries import EXPORTERS
from redraft.rows import anchors
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.target import Head, Target

Say = Callable[[str], None]
Bar = Callable[[str, int | None, str], AbstractContextManager[Progress]]
Settings = TypeVar("Settings", AdaptConfig, DistillConfig)


@dataclass(frozen=True)
class Log:
    """What is written down while a run goes on: every stage in the ledger, under ``prefix``, and lines for a person.

    ``bar`` makes the progress of a stage from its name, its total amount and the unit of that.
    """

    ledger: Ledger
    say: Say = print
    prefix: str = ""
    bar: Bar = progress_bar

    @contextmanager
    def stage(self, name: str) -> Iterator[Entry]:
        """Time a stage without a bar. Raises ``UserError`` when the ledger cannot be written."""
        with self.ledger.stage(self.prefix + name) as entry:
            yield entry

    @contextmanager
    def counted(self, name: str, total: int | None, unit: str = "tokens") -> Iterator[tuple[Entry, Progress]]:
        """Time a stage that counts up to ``total``. Raises ``UserError`` as :meth:`stage`."""
        with self.stage(name) as entry, self.bar(self.prefix + name, total, unit) as progress:
            yield entry, progress

    def entry(self, name: str) -> Entry:
        """All that a stage has used so far; an empty entry where there was no such stage."""
        named = (entry for entry in self.ledger.stages if entry.stage == self.prefix + name)
        return next(named, Entry(self.prefix + name))


def row_tokens(rows: Sequence[Any]) -> int:
    """Prompt and response tokens of all rows."""
    return sum(len(row.prompt_ids) + len(row.response_ids) for row in rows)


def supervised_rows(path: Path) -> list[Row]:
    """The rows of a response file with a position to train or to measure at. Raises ``UserError``."""
    return [row for row in read_rows(path) if anchors(row)]


def add_forward(entry: Entry, model: Any, tokens: int, bytes_written: int = 0) -> None:
    """Put a pass of a model (a target or a draft) over ``tokens`` into a stage's entry."""
    flops = provenance.forward_flops(model.parameters_per_token, tokens)
    entry.add(tokens, flops, provenance.FORWARD_FORMULA, bytes_written)


def record_of(target: Head, seed: int) -> dict[str, Any]:
    """Where a result on this target comes from, with what its chat template was told."""
    return provenance.collect(seed, str(target.device), template_record(target.tokenizer))


class Run(Generic[Settings]):
    """One run directory. What a stage needs is opened when it is first asked for."""

    def __init__(self, config: Settings, say: Say) -> None:
        """``config`` are the settings that the directory is known to belong to."""
        self.config: Settings = config
        self.say, self.folder = say, config.out
        self.log = Log(Ledger.load(self.folder / "ledger.json"), say)

    @property
    def ledger(self) -> Ledger:
        return self.log.ledger

    @property
    def served(self) -> bool:
        """Whether the target's text comes from elsewhere."""
        return False

    def open_target(self, dtype: str | None = None) -> Target:
        """The target in the run's data type, or in another ``dtype``. Raises ``UserError``."""
        c = self.config
        return open_target(c.target, dtype or c.dtype, c.device, c.adapter, c.template_arg, self.folder, self.served)

    @cached_property
    def target(self) -> Target:
        target = self.open_target()
        self.say(f"target {self.config.target}: {target.verdict()}")
        return target

    def record(self) -> dict[str, Any]:
        """Where the results of this run come from."""
        return record_of(self.target, self.config.seed)

    def check_exports(self, draft: Draft) -> None:
        """Raise ``UserError``, before anything is spent, for a draft that a format asked for does not hold."""
        for name in self.config.exports:
            check_export(name, draft, self.target, self.config.gamma)

    def finished(self) -> Draft:
        """The draft that the run ends with, in the type in which it is served."""
        raise NotImplementedError

    def export(self) -> list[Path]:
        """Write the finished draft in every format asked for; returns the folders."""
        found, gamma = [], self.config.gamma
        for name in self.config.exports:
            folder = self.folder / f"export-{name}"
            with self.log.stage(f"export {name}") as entry:
                report = EXPORTERS.get(name)(self.finished(), folder, self.target, speculative_tokens=gamma)
                entry.add(bytes_written=report.bytes)
            for warning in report.warnings:
                self.say(f"note on {folder}: {warning}")
            line = served(report.serve, self.config.target, self.config.adapter)
            self.say(f"export {name}: {folder}; serve with: {line}")
            found.append(folder)
        return found
