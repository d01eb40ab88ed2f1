"""The parts of a study's file: targets, data, selections, methods, starts, grids and single cells."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from redraft.adaptation.config import recipe
from redraft.adaptation.study.sources import parse_source
from redraft.decode.tree import parse_shape
from redraft.drafts.methods import PrivateSize
from redraft.select import parse_scorer
from redraft.select.rules import parse_budget
from redraft.starts.apply import parse_start, start_needs
from redraft.train.replay import ReplayConfig

NONE, ANY = "none", "-"


class Strict(BaseModel):
    """A part of the file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class TargetEntry(Strict):
    """A fine-tuned target with its stale draft and its prompts. Prompt sources: see docs/studies/README.md."""

    target: str
    draft: str
    prompts: tuple[str, ...] = Field(min_length=1)
    evaluation: dict[str, tuple[str, ...]] = Field(min_length=1)
    adapter: str | None = None
    base_target: str | None = None
    base_draft: str | None = None
    heldout_prompts: int = Field(default=24, gt=0)
    drop_overlap: bool = False

    @field_validator("prompts", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        return _texts(value)

    @field_validator("evaluation", mode="before")
    @classmethod
    def _evaluation(cls, value: Any) -> Any:
        if isinstance(value, str | list):
            value = {"domain": value}
        return {name: _texts(texts) for name, texts in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _sources(self) -> TargetEntry:
        for text in itertools.chain(self.prompts, *self.evaluation.values()):
            parse_source(text)
        return self


class DataEntry(Strict):
    """Where training text comes from.

    ``regenerated``: the target answers; ``reference``: the answers in the prompt files; ``traces``: served traffic;
    ``self``: the target writes ``prompts`` prompts itself and answers them.
    """

    kind: Literal["regenerated", "reference", "traces", "self"] = "regenerated"
    temperatures: tuple[float, ...] = Field(default=(0.0,), min_length=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int | None = Field(default=None, gt=1)
    path: str | None = None
    prompts: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> DataEntry:
        if (self.kind == "traces") != (self.path is not None):
            raise ValueError("a path belongs to data of kind traces, and to no other")
        if (self.kind == "self") != (self.prompts is not None):
            raise ValueError("a number of prompts belongs to data of kind self, and to no other")
        return self


class SelectionEntry(Strict):
    """What is kept: a scorer (``name`` or ``name:key=value,...``) and a budget, on responses or on prompts alone.

    ``general`` is the share of general text that is mixed in afterwards.
    """

    scorer: str | None = None
    budget: str = "100%"
    on: Literal["responses", "prompts"] = "responses"
    order: Literal["highest", "lowest"] = "highest"
    general: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _known(self) -> SelectionEntry:
        if self.scorer is not None:
            parse_scorer(self.scorer)
        elif self.budget != "100%":
            raise ValueError("a budget needs a scorer")
        parse_budget(self.budget)
        return self

    @property
    def reads_features(self) -> bool:
        """Whether the scorer works on the features that training reads too: those of the responses."""
        return self.scorer is not None and self.on == "responses" and "alpha_of" in parse_scorer(self.scorer).needs


class MethodEntry(BaseModel):
    """A method with settings of its private part (``PrivateSize``), a learning rate of its own, and replay.

    ``replay`` holds settings of ``ReplayConfig``: passes over the states that the trained draft reaches, paid for out
    of the common budget.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    replay: dict[str, Any] | None = None

    @property
    def replay_config(self) -> ReplayConfig | None:
        """Raises ``UserError`` for a setting that there is not."""
        given: dict[str, Any] = {"passes": 1} | self.replay if self.replay is not None else {}
        found = recipe(ReplayConfig, given, "replay setting")
        return found if found.passes else None

    @property
    def size(self) -> PrivateSize:
        """Raises ``UserError`` for a setting that there is not, or that cannot be."""
        return recipe(PrivateSize, self.model_extra or {}, "method setting", beside=tuple(type(self).model_fields))


class StartEntry(Strict):
    """What training starts from: the target's stale draft or another, changed by registered starts (``a+b``)."""

    draft: str | None = None
    start: str = NONE

    @field_validator("start")
    @classmethod
    def _start(cls, value: str) -> str:
        parse_start(value)
        return value

    @property
    def needs(self) -> frozenset[str]:
        """What the starts cannot do without: "base_target", "rows"."""
        return start_needs(self.start)


class General(Strict):
    """Text outside the domain: what tau is measured on before and after, and what may be mixed into the training."""

    prompts: tuple[str, ...] = Field(min_length=1)
    mix: tuple[str, ...] = ()

    @field_validator("prompts", "mix", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return _texts(value)

    @model_validator(mode="after")
    def _sources(self) -> General:
        for text in (*self.prompts, *self.mix):
            parse_source(text)
        return self


class Speed(Strict):
    """Wall-clock speed of one cell a method, in one paired run: the first on the first data, unselected.

    Each of ``shapes`` with each of ``temperatures``, on the first ``prompts`` evaluation prompts.
    """

    methods: tuple[str, ...] | None = None
    shapes: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (0.0,)
    prompts: int = Field(default=16, gt=0)

    @model_validator(mode="after")
    def _shapes(self) -> Speed:
        for text in self.shapes:
            parse_shape(text)
        return self


class Grid(Strict):
    """Lists whose product are cells; what is left out has the one usual value (for targets: all of them)."""

    targets: tuple[str, ...] | None = None
    methods: tuple[str, ...] = Field(min_length=1)
    data: tuple[str, ...] | None = None
    selections: tuple[str, ...] = (NONE,)
    losses: tuple[str, ...] = ("kl",)
    starts: tuple[str, ...] = (NONE,)
    seeds: tuple[int, ...] = (0,)


class CellEntry(Strict):
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
