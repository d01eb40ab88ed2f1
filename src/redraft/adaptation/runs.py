"""What every run has: a log of its stages, and a run directory with settings, a target and exports."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from redraft import provenance
from redraft.adaptation.cards import run_card
from redraft.adaptation.claim import check_files, fingerprints, mark_of
from redraft.adaptation.merged_target import adapter_note, merging, served
from redraft.adaptation.models import Parts, TargetSpec, open_target, tell_about
from redraft.artifact import read_sealed, write_sealed
from redraft.data.store import Rows, read_rows
from redraft.data.template import template_record
from redraft.drafts.base import Draft
from redraft.drafts.formats.base import check_export
from redraft.inputs import there
from redraft.locks import held
from redraft.progress import Progress, progress_bar
from redraft.provenance import Entry, Ledger
from redraft.registries import EXPORTERS
from redraft.reports.card import write_card
from redraft.rows import whole_length
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.target import Facts, Target
from redraft.training.workers import SINGLE, Workers

AGAIN = "delete it and give the same command again"
Say = Callable[[str], None]
Bar = Callable[[str, int | None, str], AbstractContextManager[Progress]]
Settings = TypeVar("Settings", AdaptConfig, DistillConfig)
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Log:
    """What is written down while a run goes on: every stage in the ledger, under ``prefix``, and lines for a person.

    ``bar`` makes the progress of a stage from its name, its total amount and the unit of that.
    """

    ledger: Ledger
    say: Say = print
    prefix: str = ""
    bar: Bar = progress_bar

    def stage(self, name: str) -> AbstractContextManager[Entry]:
        """Time a stage without a bar. Raises ``UserError`` when the ledger cannot be written."""
        return self.ledger.stage(self.prefix + name)

    @contextmanager
    def counted(self, name: str, total: int | None, unit: str = "tokens") -> Iterator[tuple[Entry, Progress]]:
        """Time a stage that counts up to ``total``. Raises ``UserError`` as :meth:`stage`."""
        with self.stage(name) as entry, self.bar(self.prefix + name, total, unit) as progress:
            yield entry, progress

    def entry(self, name: str) -> Entry:
        """All that a stage has used so far; an empty entry where there was no such stage."""
        named = (entry for entry in self.ledger.stages if entry.stage == self.prefix + name)
        return next(named, Entry(self.prefix + name))


def ledger_of(folder: Path, mark: str = "", workers: Workers = SINGLE) -> Ledger:
    """The ledger of a run directory; who trains along and writes no files has one of its own. Raises ``UserError``."""
    return Ledger.load(folder / "ledger.json", mark) if workers.writes else Ledger()


def half(draft: Module) -> Module:
    """A copy in bfloat16, the type that drafts are stored and served in."""
    return copy.deepcopy(draft).to(torch.bfloat16)


def row_tokens(rows: Sequence[Any]) -> int:
    """Prompt and response tokens of all rows."""
    return sum(map(whole_length, rows))


def supervised_rows(path: Path) -> Rows:
    """The rows of a response file with a position to train or to measure at. Raises ``UserError``."""
    rows = read_rows(path)
    return rows.where(rows.response_tokens > 1)


def add_forward(entry: Entry, model: Any, tokens: int, bytes_written: int = 0) -> None:
    """Put a pass of a model (a target or a draft) over ``tokens`` into a stage's entry."""
    flops = provenance.forward_flops(model.parameters_per_token, tokens)
    entry.add(tokens, flops, provenance.FORWARD_FORMULA, bytes_written)


def record_of(target: Facts, seed: int) -> dict[str, Any]:
    """Where a result on this target comes from, with what its chat template was told."""
    return provenance.collect(seed, str(target.device), template_record(target.tokenizer))


class Run(Generic[Settings]):
    """One run directory. What a stage needs is opened when it is first asked for.

    ``served`` says that the target's text comes from elsewhere.
    """

    served = False

    def __init__(self, config: Settings, say: Say) -> None:
        """``config`` are the settings that the directory is known to belong to."""
        self.config: Settings = config
        self.say, self.folder = say, config.out
        self.mark = mark_of(self.folder)
        self.workers = Workers.present()
        self.log = Log(ledger_of(self.folder, self.mark, self.workers), say)
        self.serve: dict[str, str] = {}  # by format, the command that serves what was exported

    def run(self) -> dict[str, Any]:
        """All stages, with the run directory for this process alone; what the run ends with. Raises ``UserError``."""
        with held(self.folder, say=self.say):
            return self._run()

    def _run(self) -> dict[str, Any]:
        raise NotImplementedError

    def finished(self, name: str, kind: str) -> dict[str, Any] | None:
        """What a stage has left in the file ``name``, its drafts being as it left them; none where it has not ended.

        Raises ``UserError`` for damage.
        """
        path = self.folder / name
        if not there(path):
            return None
        mend = f"delete {path} and give the same command again, which does that stage anew from where it was"
        stored = read_sealed(path, kind, self.mark, mend)
        files = stored.pop("files", {})
        if isinstance(files, dict):  # the survey of a text has a list of that name
            check_files(self.folder, files, mend)
        return stored

    def finish(self, name: str, kind: str, result: dict[str, Any], *folders: str) -> None:
        """Write what a stage ends with, and fingerprints of the drafts that it has put into ``folders``."""
        files = fingerprints(self.folder, *folders)
        write_sealed(self.folder / name, result | ({"files": files} if files else {}), kind, self.mark)

    @property
    def ledger(self) -> Ledger:
        return self.log.ledger

    def open_target(self, dtype: str | None = None) -> Target:
        """The target in the run's data type, or in another ``dtype``. Raises ``UserError``."""
        c = self.config
        return open_target(c.target, dtype or c.dtype, c.device, c.adapter, c.template_arg, self.folder, self.served)

    @cached_property
    def parts(self) -> Parts:
        """The target, of which no more is opened than is asked for."""
        return self.named_parts()

    def named_parts(self) -> Parts:
        """The target that the settings name."""
        c = self.config
        spec = TargetSpec(c.target, c.dtype, c.device, c.adapter, c.template_arg)
        return Parts(spec, self.load_target, c.dtype, self.folder, self.say)

    def load_target(self) -> Target:
        """The target, and what there is to say of it. Raises ``UserError``."""
        name, target = self.config.target, self.open_target()
        tell_about(name, target, self.say, self.parts.told)
        if rounded := target.rounding:
            self.say(
                f"note on {name}: it is served with quantised {rounded}; its text, also that of held-out prompts, "
                "is the server's, and what is computed here is near it: measure with redraft bench --server"
            )
        return target

    @property
    def target(self) -> Target:
        """The target itself, which is loaded when it is first asked for. Raises ``UserError``."""
        return self.parts.model

    @property
    def facts(self) -> Facts:
        """What is known of the target. Raises ``UserError``."""
        return self.parts.facts

    @property
    def aligned(self) -> Draft:
        """The draft that the run ends with, as it is on disk."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """Where the results of this run come from."""
        return record_of(self.facts, self.config.seed)

    def check_exports(self, draft: Draft) -> None:
        """Raise ``UserError``, before anything is spent, for a draft that a format asked for does not hold."""
        for name in self.config.exports:
            check_export(name, draft, self.parts.shown, self.config.gamma)

    def export(self) -> list[Path]:
        """Write the finished draft, in the type it is served in, in every format asked for; returns the folders."""
        found, gamma = [], self.config.gamma
        for name in self.config.exports:
            folder = self.folder / f"export-{name}"
            with self.log.stage(f"export {name}") as entry:
                report = EXPORTERS.get(name)(half(self.aligned), folder, self.parts.shown, speculative_tokens=gamma)
                entry.add(bytes_written=report.bytes)
            for warning in report.warnings:
                self.say(f"note on {folder}: {warning}")
            line = served(report.serve, self.config.target, self.config.adapter)
            self.say(f"export {name}: {folder}; {report.use} with: {line}")
            self.serve[name] = line
            found.append(folder)
        self.cards()
        if found and (note := adapter_note(self.config.target, self.config.adapter)):
            self.say(f"note: {note}")
        return found

    def cards(self) -> None:
        """Write what is known so far onto the model card of every export. Raises ``UserError``."""
        first: list[str] = merging(self.config.target, self.config.adapter)
        for name, line in self.serve.items():
            card = run_card(self.folder, name, self.aligned, self.facts, [*first, line])
            write_card(self.folder / f"export-{name}", card)
