"""The parts of a study's file: targets, data, selections, methods, starts, grids and single cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict

from redraft.settings.base import Part, block_of, check, setting
from redraft.settings.budget import parse_budget
from redraft.settings.common import BudgetText, ScorerName, StartName
from redraft.settings.methods import PrivateSize
from redraft.settings.scorers import parse_scorer
from redraft.settings.shapes import parse_shape
from redraft.settings.texts import parse_source, start_needs
from redraft.settings.training import ReplayConfig

NONE, ANY = "none", "-"


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _evaluation(value: Any) -> Any:
    if isinstance(value, str | list):
        value = {"domain": value}
    return {name: _texts(texts) for name, texts in value.items()} if isinstance(value, dict) else value


# Prompt sources, one or several: see docs/studies/README.md.
Sources = Annotated[tuple[Annotated[str, check(parse_source)], ...], BeforeValidator(_texts)]


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

    scorer: ScorerName | None = setting(None, "how samples are scored")
    budget: BudgetText = setting("100%", "what is kept")
    on: Literal["responses", "prompts"] = setting("responses", "what is scored")
    order: Literal["highest", "lowest"] = setting("highest", "which scores come first")
    general: float = setting(0.0, "share of general text that is mixed in afterwards", ge=0, lt=1)

    def conflicts(self) -> Iterator[str]:
        if self.scorer is None and not parse_budget(self.budget).whole:
            yield "a budget needs a scorer"

    @property
    def reads_features(self) -> bool:
        """Whether the scorer works on the features that training reads too: those of the responses."""
        return self.scorer is not None and self.on == "responses" and "alpha_of" in parse_scorer(self.scorer).needs


class MethodEntry(Part):
    """A method with settings of its private part (``PrivateSize``), a learning rate of its own, and replay.

    ``replay`` holds settings of ``ReplayConfig``: passes over the states that the trained draft reaches, paid for out
    of the common budget.
    """

    model_config = ConfigDict(extra="allow")
    REST: ClassVar[Any] = PrivateSize

    method: str | None = setting(None, "the registered method; by default the one of this name")
    learning_rate: float | None = setting(None, "highest learning rate", gt=0)
    replay: block_of(ReplayConfig, "replay") | None = setting(None, "replay after the training")  # type: ignore[valid-type]

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
    start: StartName = setting(NONE, "registered starts, joined by +")

    @property
    def needs(self) -> frozenset[str]:
        """What the starts cannot do without: "base_target", "rows"."""
        return start_needs(self.start)


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
