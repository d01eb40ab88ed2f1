"""The settings of a study, and the cells that they ask for.

Everything is looked up when the file is read: a name that is not there and a cell that is there twice are one line
each, before anything is loaded. What scorers and starts need is asked when the study begins (:meth:`check_needs`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ValidationError

from redraft.errors import UserError
from redraft.registries import LOSSES, nearest
from redraft.settings.base import AUTO, DtypeName, Part, Settings, block_of, complaints, known_name, setting
from redraft.settings.methods import METHODS, PrivateSize, method
from redraft.settings.scorers import parse_scorer
from redraft.settings.shapes import ChainShape, DynamicTree, StaticTree, parse_shape
from redraft.settings.study_parts import (
    ANY,
    NONE,
    Cell,
    CellEntry,
    DataEntry,
    General,
    Grid,
    MethodEntry,
    SelectionEntry,
    Speed,
    StartEntry,
    TargetEntry,
)
from redraft.settings.training import ReplayConfig, TrainConfig
from redraft.settings.yamlfile import read_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]*")
# What the study itself sets in every training run.
OWN_TRAIN_SETTINGS = ("loss", "gamma", "seed")


class StudySettings(Settings):
    """A study's file and what is done with it."""

    COMMAND: ClassVar[str] = "study"

    config: Path | None = setting(None, "YAML file of the study (docs/studies/README.md)", argument=True, reads="file")
    out: Path | None = setting(None, "folder of the study; a stopped one goes on from it")
    tables: Path | None = setting(
        None, "results file: make its tables and pictures again, and nothing else", reads="file"
    )
    list_cells: bool = setting(False, "print the cells and stop", flag="--list")
    template_arg: dict[str, Any] = setting({}, "argument of the targets' chat templates; repeatable")
    full: Path | None = setting(None, "file for what full reached, as the quickstart reads it")

    def conflicts(self) -> Iterator[str]:
        if (self.config is None) == (self.tables is None):
            yield "give the YAML file of a study, or --tables with the results of one"


def _one(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


def _speed(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class StudyConfig(Part):
    """The whole file."""

    name: str = setting(..., "name of the study")
    about: str = setting("", "what it asks, in a sentence or two")
    targets: dict[str, TargetEntry] = setting(..., "targets by name", min_length=1)
    data: dict[str, DataEntry] = setting(
        None, "training texts by name", default_factory=lambda: {"regenerated": DataEntry()}
    )
    methods: dict[str, MethodEntry] = setting({}, "methods with settings of their own, by name")
    selections: dict[str, SelectionEntry] = setting({}, "selections by name")
    starts: dict[str, StartEntry] = setting({}, "starts by name")
    general: General | None = setting(None, "text outside the domain")
    grid: Annotated[tuple[Grid, ...], BeforeValidator(_one)] = setting((), "products of cells")
    cells: tuple[CellEntry, ...] = setting((), "single cells")
    max_new_tokens: int = setting(160, "longest answer to train on, in tokens", gt=1)
    evaluation_tokens: int = setting(128, "longest answer to measure on, in tokens", gt=1)
    longest_prompt: int | None = setting(None, "characters; longer prompts are left out everywhere", gt=0)
    temperature: float = setting(1.0, "of the sampled evaluation", gt=0)
    gamma: int = setting(5, "drafted tokens a round", gt=0)
    tree: str | None = setting(None, "a tree of greedy drafts, walked beside the chain")
    budget: Literal["tokens", "epochs"] = setting("tokens", "what every cell has the same of")
    train: block_of(TrainConfig, "train") = setting({}, "common training settings")  # type: ignore[valid-type]
    speed: Annotated[Speed | None, BeforeValidator(_speed)] = setting(None, "wall-clock speed, measured at the end")
    keep_drafts: bool = setting(False, "keep the trained drafts")
    template_arg: dict[str, Any] = setting({}, "arguments of the targets' chat templates")
    batch_size: int = setting(64, "sequences decoded together", gt=0)
    dtype: DtypeName = setting(AUTO, "data type of the targets")
    device: str = setting("cpu", "torch device")
    seed: int = setting(0, "seed of everything random that cells share")

    def conflicts(self) -> Iterator[str]:
        for kind in ("targets", "data", "methods", "selections", "starts"):
            for name in getattr(self, kind):
                if not NAME.fullmatch(name):
                    yield f"{kind}: the name {name!r} must be of letters, digits and _ + . - alone"
        for name, entry in self.methods.items():
            if name in METHODS and entry.method not in (None, name):
                yield f"methods: {name} is the name of a method, so it cannot stand for {entry.method}"
            self.method_of(name)
        for entries in (self.selections, self.starts):
            if NONE in entries:
                yield f"{NONE!r} is what it says and cannot be given another meaning"
        for name in OWN_TRAIN_SETTINGS:
            if name in self.train:
                yield f"train {name} is set by the study itself: cells have a loss and a seed, the study has gamma"
        list(self.all_cells())
        assert self.tree_shape or self.tree is None

    @property
    def tree_shape(self) -> StaticTree | DynamicTree | None:
        """What is walked beside the chain. Raises ``UserError`` for what is no tree."""
        shape = None if self.tree is None else parse_shape(self.tree)
        if isinstance(shape, ChainShape):
            raise UserError(f"{self.tree} is no tree; give tree:4x4x12, or set gamma for a chain")
        return shape

    # -- looking names up ------------------------------------------------------------------------------------------
    def method_of(self, name: str) -> str:
        """The registered method behind a name. Raises ``UserError``."""
        entry = self.methods.get(name)
        if entry is None:
            known_name("method", name, dict.fromkeys([*self.methods, *METHODS]))
        found = (entry.method if entry else None) or name
        method(found)
        return found

    def size_of(self, name: str) -> PrivateSize:
        return self.methods[name].size if name in self.methods else PrivateSize()

    def replay_of(self, name: str) -> ReplayConfig | None:
        return self.methods[name].replay_config if name in self.methods else None

    def trains(self, name: str) -> bool:
        return bool(method(self.method_of(name)).groups)

    def selection_of(self, name: str) -> SelectionEntry:
        """``none``, a name under selections, or ``SCORER@BUDGET``. Raises ``UserError``."""
        if name == NONE:
            return SelectionEntry()
        if name in self.selections:
            return self.selections[name]
        scorer, at, budget = name.rpartition("@")
        if not at:
            listed = [NONE, *self.selections]
            near = nearest(name, listed)
            raise UserError(f"unknown selection {name!r}{near}; choose one of {', '.join(listed)}, or SCORER@BUDGET")
        return made(SelectionEntry, scorer=scorer, budget=budget)

    def start_of(self, name: str) -> StartEntry:
        """A name under starts, or registered starts as ``a+b``. Raises ``UserError``."""
        if name in self.starts:
            return self.starts[name]
        try:
            return made(StartEntry, start=name)
        except UserError as error:
            defined = f" of the study: {', '.join(self.starts)}" if self.starts else ", and the study defines none"
            raise UserError(f"{error}{defined}") from None

    def train_config(self, loss: str, seed: int, method_name: str | None = None) -> TrainConfig:
        """The common training settings; of a method's own there is the learning rate alone. Raises ``UserError``."""
        common = TrainConfig(**self.train)
        own = self.methods.get(method_name or "")
        rate = own.learning_rate if own and own.learning_rate else common.learning_rate
        return replace(common, learning_rate=rate, loss=loss, gamma=self.gamma, seed=seed)

    # -- cells -----------------------------------------------------------------------------------------------------
    def all_cells(self) -> Iterator[Cell]:
        """Every cell once, the untrained stale draft of every target first. Raises ``UserError`` for a double one.

        In a product, cells that differ in what a training-free method does not depend on are one cell.
        """
        if not self.grid and not self.cells:
            raise UserError("the study has no cells; give a grid, or cells")
        seen: dict[Cell, str] = {}
        for name in self.targets:
            yield (baseline := Cell(name, NONE, ANY, ANY, ANY, NONE, 0))
            seen[baseline] = "baseline"
        for place, asked, cell in self._asked():
            self._check(asked)
            if cell in seen:
                if seen[cell] in ("baseline", place) and not self.trains(cell.method):
                    continue
                raise UserError(f"the cell {cell.key} is there twice ({seen[cell]} and {place}); remove one")
            seen[cell] = place
            yield cell

    def _asked(self) -> Iterator[tuple[str, Cell, Cell]]:
        first = next(iter(self.data), None)
        if first is None:
            raise UserError("the study has no data; leave the key out for regenerated responses")
        for index, grid in enumerate(self.grid, 1):
            place = f"grid {index}"
            axes: tuple[tuple[Any, ...], ...] = (
                grid.targets or tuple(self.targets), grid.methods, grid.data or (first,), grid.selections,
                grid.losses, grid.starts, grid.seeds,
            )  # fmt: skip
            for values in axes:
                if twice := {v for v in values if values.count(v) > 1}:
                    raise UserError(f"{place} lists {', '.join(map(str, sorted(twice)))} twice; remove one")
            for values in itertools.product(*axes):
                asked = Cell(*values)
                yield place, asked, self._plain(asked)
        for index, entry in enumerate(self.cells, 1):
            if entry.target is None and len(self.targets) > 1:
                raise UserError(f"cell {index} names no target; choose one of {', '.join(self.targets)}")
            target = entry.target or next(iter(self.targets))
            rest = (entry.selection, entry.loss, entry.start, entry.seed)
            asked = Cell(target, entry.method, entry.data or first, *rest)
            yield f"cell {index}", asked, self._plain(asked)

    def _plain(self, cell: Cell) -> Cell:
        """The cell with ``ANY`` for what it does not depend on."""
        if self.trains(cell.method):
            return cell
        if self.start_of(cell.start).start != NONE:
            return Cell(cell.target, cell.method, cell.data, cell.selection, ANY, cell.start, 0)
        return Cell(cell.target, cell.method, ANY, ANY, ANY, cell.start, 0)

    def _check(self, cell: Cell) -> None:
        """Raise ``UserError`` for a name that is not there, or something that the cell needs and was not given."""
        for kind, name, known in (("target", cell.target, self.targets), ("data", cell.data, self.data)):
            known_name(kind, name, known)
        known_name("loss", cell.loss, LOSSES.names())
        self.start_of(cell.start)
        selection = self.selection_of(cell.selection)
        if selection.general and (self.general is None or not self.general.mix):
            raise UserError(f"selection {cell.selection} mixes general text in; give general: mix: PROMPTS")

    def check_needs(self) -> None:
        """Ask the scorers and starts of all cells for what they need, which imports them. Raises ``UserError``."""
        for _, cell, _ in self._asked():
            if self.targets[cell.target].base_target is not None:
                continue
            scorer, start = self.selection_of(cell.selection).scorer, self.start_of(cell.start)
            if scorer and "base_target" in parse_scorer(scorer).needs:
                raise UserError(f"scorer {scorer} needs the base target of {cell.target}; give its base_target")
            if "base_target" in start.needs:
                raise UserError(f"start {cell.start} needs the base target of {cell.target}; give its base_target")


# Every name that the file may hold anywhere, to name the nearest to one that it may not.
PARTS = (StudyConfig, TargetEntry, DataEntry, SelectionEntry, StartEntry, General, Speed, Grid, CellEntry)
KNOWN = sorted({name for part in PARTS for name in part.model_fields})
Entry = TypeVar("Entry", bound=Part)


def made(kind: type[Entry], **values: Any) -> Entry:
    """A part of a study. Raises ``UserError`` that tells all mistakes."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError("; ".join(complaints(error, KNOWN))) from None


# -- reading -------------------------------------------------------------------------------------------------------
def parse_study(values: Mapping[str, Any]) -> StudyConfig:
    """Checked settings. Raises ``UserError`` that tells all mistakes."""
    try:
        return made(StudyConfig, **values)
    except UserError as error:
        raise UserError(f"{error}; see docs/studies/README.md") from None


def read_study(path: Path) -> StudyConfig:
    """The study of a YAML file. Raises ``UserError``."""
    return parse_study(read_yaml(path, "the settings of a study"))
