"""The settings of a study, and the cells that they ask for.

Everything is looked up when the file is read: a name that is not there, a cell that is there twice and a scorer that
lacks what it needs are one line each, before anything is loaded.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from redraft.adaptation.config import recipe
from redraft.adaptation.study.entries import (
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
    Strict,
    TargetEntry,
)
from redraft.adaptation.yamlfile import read_yaml
from redraft.decode.tree import ChainShape, DynamicTree, StaticTree, parse_shape
from redraft.drafts.methods import METHODS, PrivateSize, method
from redraft.errors import UserError
from redraft.registries import LOSSES
from redraft.registry import nearest
from redraft.select import Scorer, parse_scorer
from redraft.train.replay import ReplayConfig
from redraft.train.trainer import TrainConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]*")
# What the study itself sets in every training run.
OWN_TRAIN_SETTINGS = ("loss", "gamma", "seed")


class StudyConfig(Strict):
    """The whole file."""

    name: str
    about: str = ""
    targets: dict[str, TargetEntry] = Field(min_length=1)
    data: dict[str, DataEntry] = {"regenerated": DataEntry()}
    methods: dict[str, MethodEntry] = {}
    selections: dict[str, SelectionEntry] = {}
    starts: dict[str, StartEntry] = {}
    general: General | None = None
    grid: tuple[Grid, ...] = ()
    cells: tuple[CellEntry, ...] = ()
    max_new_tokens: int = Field(default=160, gt=1)
    evaluation_tokens: int = Field(default=128, gt=1)
    longest_prompt: int | None = Field(
        default=None, gt=0, description="characters; longer prompts are left out everywhere"
    )
    temperature: float = Field(default=1.0, gt=0, description="of the sampled evaluation")
    gamma: int = Field(default=5, gt=0)
    tree: str | None = Field(default=None, description="a tree of greedy drafts, walked beside the chain")
    budget: Literal["tokens", "epochs"] = "tokens"
    train: dict[str, Any] = {}
    speed: Speed | None = None
    keep_drafts: bool = False
    template_arg: dict[str, Any] = Field(default={}, description="arguments of the targets' chat templates")
    batch_size: int = Field(default=64, gt=0)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = "cpu"
    seed: int = 0

    @field_validator("grid", mode="before")
    @classmethod
    def _grid(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @field_validator("speed", mode="before")
    @classmethod
    def _speed(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _names(self) -> StudyConfig:
        for kind in ("targets", "data", "methods", "selections", "starts"):
            for name in getattr(self, kind):
                if not NAME.fullmatch(name):
                    raise UserError(f"{kind}: the name {name!r} must be of letters, digits and _ + . - alone")
        for name, entry in self.methods.items():
            if name in METHODS and entry.method not in (None, name):
                raise UserError(f"methods: {name} is the name of a method, so it cannot stand for {entry.method}")
            self.method_of(name), entry.size, entry.replay_config
        for entries in (self.selections, self.starts):
            if NONE in entries:
                raise UserError(f"{NONE!r} is what it says and cannot be given another meaning")
        self.train_config("kl", 0)
        list(self.all_cells())
        _ = self.tree_shape
        return self

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
        if entry is None and name not in METHODS:
            known = ", ".join(dict.fromkeys([*self.methods, *METHODS]))
            raise UserError(f"unknown method {name!r}; choose one of {known}, or define it under methods")
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
            listed = ", ".join([NONE, *self.selections])
            raise UserError(f"unknown selection {name!r}; choose one of {listed}, or write SCORER@BUDGET")
        return SelectionEntry(scorer=scorer, budget=budget)

    def start_of(self, name: str) -> StartEntry:
        """A name under starts, or registered starts as ``a+b``. Raises ``UserError``."""
        if name in self.starts:
            return self.starts[name]
        try:
            return StartEntry(start=name)
        except UserError as error:
            defined = f" of the study: {', '.join(self.starts)}" if self.starts else ", and the study defines none"
            raise UserError(f"{error}{defined}") from None

    def scorer_of(self, name: str) -> Scorer | None:
        entry = self.selection_of(name)
        return parse_scorer(entry.scorer) if entry.scorer else None

    def train_config(self, loss: str, seed: int, method_name: str | None = None) -> TrainConfig:
        """The common training settings; of a method's own there is the learning rate alone. Raises ``UserError``."""
        common = recipe(TrainConfig, self.train, "training setting", OWN_TRAIN_SETTINGS)
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
            if name not in known:
                raise UserError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}, or define it")
        LOSSES.get(cell.loss)
        entry, selection, start = (
            self.targets[cell.target],
            self.selection_of(cell.selection),
            self.start_of(cell.start),
        )
        scorer = self.scorer_of(cell.selection)
        if scorer and "base_target" in scorer.needs and entry.base_target is None:
            raise UserError(f"scorer {scorer.name} needs the base target of {cell.target}; give its base_target")
        if "base_target" in start.needs and entry.base_target is None:
            raise UserError(f"start {cell.start} compares with the base target of {cell.target}; give its base_target")
        if selection.general and (self.general is None or not self.general.mix):
            raise UserError(f"selection {cell.selection} mixes general text in; give general: mix: PROMPTS")


# Every name that the file may hold anywhere, to name the nearest to one that it may not.
PARTS = (StudyConfig, TargetEntry, DataEntry, SelectionEntry, StartEntry, General, Speed, Grid, CellEntry)
KNOWN = sorted({name for part in PARTS for name in part.model_fields})


# -- reading -------------------------------------------------------------------------------------------------------
def parse_study(values: Mapping[str, Any]) -> StudyConfig:
    """Checked settings. Raises ``UserError`` that names the first bad one."""
    try:
        return StudyConfig(**values)
    except ValidationError as error:
        # a name that is unknown tells more than that one like it is missing
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        place = ".".join(str(part) for part in first["loc"]) or "study"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown setting{nearest(str(first['loc'][-1]), KNOWN)}"
        raise UserError(f"{place}: {message[0].lower()}{message[1:]}; see docs/studies/README.md") from None


def read_study(path: Path) -> StudyConfig:
    """The study of a YAML file. Raises ``UserError``."""
    return parse_study(read_yaml(path, "the settings of a study"))
