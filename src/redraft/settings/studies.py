"""The settings of a study, and the cells that they ask for.

Everything is looked up when the file is read: a name that is not there and a cell that is there twice are one line
each, before anything is loaded. What scorers and starts need is asked when the study begins (:meth:`check_needs`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, ValidationError

from redraft.errors import UserError
from redraft.registries import LOSSES, nearest
from redraft.settings import texts
from redraft.settings.base import AUTO, DtypeName, Part, Settings, check, complaints, known_name, read_yaml, setting
from redraft.settings.shapes import ChainShape, DynamicTree, StaticTree, parse_shape
from redraft.settings.training import METHODS, PrivateSize, ReplayBlock, ReplayConfig, TrainBlock, TrainConfig, method

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]*")
# What the study itself sets in every training run.
OWN_TRAIN_SETTINGS = ("loss", "gamma", "seed")
NONE, ANY = "none", "-"


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


def _evaluation(value: Any) -> Any:
    if isinstance(value, str | list):
        value = {"domain": value}
    return {name: _several(given) for name, given in value.items()} if isinstance(value, dict) else value


# Prompt sources, one or several: see docs/studies/README.md.
Sources = Annotated[tuple[Annotated[str, check(texts.parse_source)], ...], BeforeValidator(_several)]


class TargetEntry(Part):
    """A fine-tuned target with its stale draft and its prompts."""

    target: str = setting(..., "fine-tuned target: folder, hub id, or folder of a PEFT adapter")
    draft: str = setting(..., "stale draft: folder in any format, or hub id")
    prompts: Sources = setting(..., "prompt sources to train on", min_length=1)
    evaluation: Annotated[dict[str, Sources], BeforeValidator(_evaluation)] = setting(
        ..., "prompt sources to measure on, by the name of their domain", min_length=1
    )
    adapter: str | None = setting(None, "PEFT adapter to merge into the target")
    base_target: str | None = setting(None, "target that the stale draft was made for")
    base_draft: str | None = setting(None, "shared draft, when the draft is a private part")
    heldout_prompts: int = setting(24, "prompts kept back for early stopping", gt=0)
    drop_overlap: bool = setting(False, "drop training prompts that are measured on, instead of refusing them")


class DataEntry(Part):
    """Where training text comes from.

    ``regenerated``: the target answers; ``reference``: the answers in the prompt files; ``traces``: served traffic;
    ``self``: the target writes ``prompts`` prompts itself and answers them.
    """

    kind: Literal["regenerated", "reference", "traces", "self"] = setting("regenerated", "where the text comes from")
    temperatures: tuple[float, ...] = setting((0.0,), "sampling temperatures", min_length=1)
    top_p: float = setting(1.0, "nucleus of sampled answers", gt=0, le=1)
    max_new_tokens: int | None = setting(None, "longest answer, in tokens", gt=1)
    path: str | None = setting(None, "file of served traffic")
    prompts: int | None = setting(None, "prompts that the target writes itself", gt=0)

    def conflicts(self) -> Iterator[str]:
        if (self.kind == "traces") != (self.path is not None):
            yield "a path belongs to data of kind traces, and to no other"
        if (self.kind == "self") != (self.prompts is not None):
            yield "a number of prompts belongs to data of kind self, and to no other"


class SelectionEntry(Part):
    """What is kept: a scorer (``name`` or ``name:key=value,...``) and a budget, on responses or on prompts alone."""

    scorer: texts.ScorerName | None = setting(None, "how samples are scored")
    budget: texts.BudgetText = setting("100%", "what is kept")
    on: Literal["responses", "prompts"] = setting("responses", "what is scored")
    order: Literal["highest", "lowest"] = setting("highest", "which scores come first")
    general: float = setting(0.0, "share of general text that is mixed in afterwards", ge=0, lt=1)

    def conflicts(self) -> Iterator[str]:
        if self.scorer is None and not texts.parse_budget(self.budget).whole:
            yield "a budget needs a scorer"

    @property
    def reads_features(self) -> bool:
        """Whether the scorer works on the features that training reads too: those of the responses."""
        return (
            self.scorer is not None and self.on == "responses" and "alpha_of" in texts.parse_scorer(self.scorer).needs
        )


class MethodEntry(Part):
    """A method with settings of its private part (``PrivateSize``), a learning rate of its own, and replay.

    ``replay`` holds settings of ``ReplayConfig``: passes over the states that the trained draft reaches, paid for out
    of the common budget.
    """

    model_config = ConfigDict(extra="allow")
    REST: ClassVar[Any] = PrivateSize

    method: str | None = setting(None, "the registered method; by default the one of this name")
    learning_rate: float | None = setting(None, "highest learning rate", gt=0)
    replay: ReplayBlock | None = setting(None, "replay after the training")

    def conflicts(self) -> Iterator[str]:
        assert self.size
        yield from ()

    @property
    def replay_config(self) -> ReplayConfig | None:
        """Replay as it was asked for; without a number of passes it is one."""
        found = ReplayConfig(**{"passes": 1, **self.replay}) if self.replay is not None else None
        return found if found and found.passes else None

    @property
    def size(self) -> PrivateSize:
        """Raises ``UserError`` for a setting that there is not, or that cannot be."""
        return PrivateSize(**self.model_extra or {})


class StartEntry(Part):
    """What training starts from: the target's stale draft or another, changed by registered starts (``a+b``)."""

    draft: str | None = setting(None, "another draft than the target's stale one")
    start: texts.StartName = setting(NONE, "registered starts, joined by +")

    @property
    def needs(self) -> frozenset[str]:
        """What the starts cannot do without: "base_target", "rows"."""
        return texts.start_needs(self.start)


class General(Part):
    """Text outside the domain: what tau is measured on before and after, and what may be mixed into the training."""

    prompts: Sources = setting(..., "prompt sources to measure on", min_length=1)
    mix: Sources = setting((), "prompt sources to mix into the training")


class Speed(Part):
    """Wall-clock speed of one cell a method, in one paired run: the first on the first data, unselected.

    Each of ``shapes`` with each of ``temperatures``, on the first ``prompts`` evaluation prompts.
    """

    methods: tuple[str, ...] | None = setting(None, "methods to measure; by default all")
    shapes: tuple[Annotated[str, check(parse_shape)], ...] = setting((), "shapes of proposals")
    temperatures: tuple[float, ...] = setting((0.0,), "sampling temperatures")
    prompts: int = setting(16, "evaluation prompts", gt=0)


class Grid(Part):
    """Lists whose product are cells; what is left out has the one usual value (for targets: all of them)."""

    targets: tuple[str, ...] | None = None
    methods: tuple[str, ...] = setting(..., "methods", min_length=1)
    data: tuple[str, ...] | None = None
    selections: tuple[str, ...] = (NONE,)
    losses: tuple[str, ...] = ("kl",)
    starts: tuple[str, ...] = (NONE,)
    seeds: tuple[int, ...] = (0,)


class CellEntry(Part):
    """One cell by hand."""

    method: str
    target: str | None = None
    data: str | None = None
    selection: str = NONE
    loss: str = "kl"
    start: str = NONE
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """One point of the study. ``ANY`` stands where nothing depends on the choice (a method that trains nothing)."""

    target: str
    method: str
    data: str
    selection: str
    loss: str
    start: str
    seed: int

    @property
    def key(self) -> str:
        return " | ".join(map(str, asdict(self).values()))


# -- the whole ---------------------------------------------------------------------------------------------------------
class StudySettings(Settings):
    """A study's file and what is done with it."""

    COMMAND: ClassVar[str] = "study"

    config: Path | None = setting(None, "YAML file of the study (docs/studies/README.md)", argument=True, reads="file")
    out: Path | None = setting(None, "folder of the study; a stopped one goes on from it")
    tables: Path | None = setting(None, "results file: only make its tables and pictures again", reads="file")
    list_cells: bool = setting(False, "print the cells and stop", flag="--list")
    template_arg: dict[str, Any] = setting({}, "argument of the targets' chat templates; repeatable")
    full: Path | None = setting(None, "file for what full reached, as the quickstart reads it")

    def conflicts(self) -> Iterator[str]:
        if (self.config is None) == (self.tables is None):
            yield "give the YAML file of a study, or --tables with the results of one"


def _speed(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class StudyConfig(Part):
    """The whole file."""

    name: str = setting(..., "name of the study")
    about: str = setting("", "what it asks, in a sentence or two")
    targets: dict[str, TargetEntry] = setting(..., "targets by name", min_length=1)
    data: dict[str, DataEntry] = setting({"regenerated": {}}, "training texts by name", validate_default=True)
    methods: dict[str, MethodEntry] = setting({}, "methods with settings of their own, by name")
    selections: dict[str, SelectionEntry] = setting({}, "selections by name")
    starts: dict[str, StartEntry] = setting({}, "starts by name")
    general: General | None = setting(None, "text outside the domain")
    grid: Annotated[tuple[Grid, ...], BeforeValidator(_several)] = setting((), "products of cells")
    cells: tuple[CellEntry, ...] = setting((), "single cells")
    max_new_tokens: int = setting(160, "longest answer to train on, in tokens", gt=1)
    evaluation_tokens: int = setting(128, "longest answer to measure on, in tokens", gt=1)
    longest_prompt: int | None = setting(None, "characters; longer prompts are left out everywhere", gt=0)
    temperature: float = setting(1.0, "of the sampled evaluation", gt=0)
    gamma: int = setting(5, "drafted tokens a round", gt=0)
    tree: str | None = setting(None, "a tree of greedy drafts, walked beside the chain")
    budget: Literal["tokens", "epochs"] = setting("tokens", "what every cell has the same of")
    train: TrainBlock = setting({}, "common training settings")
    speed: Annotated[Speed | None, BeforeValidator(_speed)] = setting(None, "wall-clock speed, measured at the end")
    keep_drafts: bool = setting(False, "keep the trained drafts")
    template_arg: dict[str, Any] = setting({}, "arguments of the targets' chat templates")
    batch_size: int = setting(64, "sequences decoded together", gt=0)
    dtype: DtypeName = setting(AUTO, "data type of the targets")
    device: str = setting("cpu", "torch device")
    seed: int = setting(0, "seed of everything random that cells share", lt=2**62)

    def conflicts(self) -> Iterator[str]:
        for kind in ("targets", "data", "methods", "selections", "starts"):
            for name in getattr(self, kind):
                if not NAME.fullmatch(name):
                    yield f"{kind}: the name {name!r} must be of letters, digits and _ + . - alone"
        for name, entry in self.methods.items():
            if name in METHODS and entry.method not in (None, name):
                yield f"methods: {name} is the name of a method, so it cannot stand for {entry.method}"
            self.method_of(name)
        if NONE in {*self.selections, *self.starts}:
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
    def entry_of(self, name: str) -> MethodEntry:
        """What the study says of a method; where it says nothing, all is left to the method."""
        return self.methods.get(name, MethodEntry())

    def method_of(self, name: str) -> str:
        """The registered method behind a name. Raises ``UserError``."""
        if name not in self.methods:
            known_name("method", name, dict.fromkeys([*self.methods, *METHODS]))
        found = self.entry_of(name).method or name
        method(found)
        return found

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
        rate = self.entry_of(method_name or "").learning_rate
        own = {"loss": loss, "gamma": self.gamma, "seed": seed} | ({"learning_rate": rate} if rate else {})
        return TrainConfig(**self.train | own)

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
        for place, asked in self._asked():
            self._check(asked)
            if (cell := self._plain(asked)) in seen:
                if seen[cell] in ("baseline", place) and not self.trains(cell.method):
                    continue
                raise UserError(f"the cell {cell.key} is there twice ({seen[cell]} and {place}); remove one")
            seen[cell] = place
            yield cell

    def _asked(self) -> Iterator[tuple[str, Cell]]:
        first = next(iter(self.data), None)
        if first is None:
            raise UserError("the study has no data; leave the key out for regenerated responses")
        for index, grid in enumerate(self.grid, 1):
            lists = grid.model_dump() | {"targets": grid.targets or tuple(self.targets), "data": grid.data or (first,)}
            for values in lists.values():
                if twice := {v for v in values if values.count(v) > 1}:
                    raise UserError(f"grid {index} lists {', '.join(map(str, sorted(twice)))} twice; remove one")
            yield from ((f"grid {index}", Cell(*values)) for values in itertools.product(*lists.values()))
        for index, entry in enumerate(self.cells, 1):
            if entry.target is None and len(self.targets) > 1:
                raise UserError(f"cell {index} names no target; choose one of {', '.join(self.targets)}")
            left = {"target": next(iter(self.targets)), "data": first}
            yield f"cell {index}", Cell(**left | entry.model_dump(exclude_none=True))

    def _plain(self, cell: Cell) -> Cell:
        """The cell with ``ANY`` for what it does not depend on."""
        if self.trains(cell.method):
            return cell
        if self.start_of(cell.start).start != NONE:
            return replace(cell, loss=ANY, seed=0)
        return replace(cell, data=ANY, selection=ANY, loss=ANY, seed=0)

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
        for _, cell in self._asked():
            if self.targets[cell.target].base_target is not None:
                continue
            scorer, start = self.selection_of(cell.selection).scorer, self.start_of(cell.start)
            if scorer and "base_target" in texts.parse_scorer(scorer).needs:
                raise UserError(f"scorer {scorer} needs the base target of {cell.target}; give its base_target")
            if "base_target" in start.needs:
                raise UserError(f"start {cell.start} needs the base target of {cell.target}; give its base_target")


# Every name that the file may hold anywhere, to name the nearest to one that it may not.
KNOWN = sorted({name for part in Part.__subclasses__() if part is not Settings for name in part.model_fields})
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
    values = read_yaml(path, "the settings of a study")
    try:
        return parse_study(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
