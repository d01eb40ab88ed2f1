"""The files of a study as they are read back: records of cells, facts of targets, results; each part in its type.

The models state what tables and resuming use, and everything else passes through. Readers give the plain JSON values,
which tables are made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from redraft.errors import UserError
from redraft.inputs import read_json, typed
from redraft.reports.load import BenchResult

SCHEMA = "redraft.study/1"
MEND = "copy the file again, or delete it and give the command of the study again"


class _Open(BaseModel, extra="allow", allow_inf_nan=False):
    """Base of every part: other keys are kept."""


class Record(_Open):
    """What one cell came to. ``rounds`` lists them by evaluation set, a number a prompt; ``heldout`` (step, tau)."""

    key: str
    target: str
    method: str
    data: str
    selection: str
    loss: str
    start: str
    seed: int
    settings: dict[str, Any]
    rounds: dict[str, Annotated[list[PositiveFloat], Field(min_length=1)]] = Field(min_length=1)
    trained_parameters: NonNegativeInt
    full_parameters: PositiveInt
    private_width: NonNegativeInt
    private_bytes: NonNegativeInt
    flops: dict[str, NonNegativeInt]
    seconds: dict[str, NonNegativeFloat]
    kept_rows: NonNegativeFloat | None = None  # above 1 where general texts are mixed in
    kept_tokens: NonNegativeFloat | None = None
    trained_tokens: NonNegativeInt = 0
    steps: NonNegativeInt = 0
    heldout: list[tuple[NonNegativeInt, PositiveFloat]] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Record:
        if self.heldout and "train" not in self.flops:
            raise ValueError("'flops' lacks 'train', and the cell was trained")
        return self


class Data(_Open):
    """A set of training texts in numbers."""

    rows: NonNegativeInt
    tokens: NonNegativeInt


class Asked(_Open):
    """An evaluation set: task and tokens of every prompt."""

    prompts: list[Any]
    tasks: list[str]
    tokens: list[PositiveFloat] = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> Asked:
        if not len(self.prompts) == len(self.tasks) == len(self.tokens):
            raise ValueError("'prompts', 'tasks' and 'tokens' differ in length")
        return self


class Facts(_Open):
    """What is known of a target."""

    target: str
    draft: str
    data: dict[str, Data]
    sets: dict[str, Asked] = Field(min_length=1)
    speed: list[BenchResult] = []


class Start(_Open):
    start: str
    draft: str | None


class Selection(_Open):
    scorer: str
    on: str
    general: float | None = None


class Method(_Open):
    method: str | None = None


class Config(_Open):
    """The settings of a study, as far as tables ask."""

    data: dict[str, Any] = Field(min_length=1)
    methods: dict[str, Method | None]
    selections: dict[str, Selection | None]
    starts: dict[str, Start | None]
    temperature: NonNegativeFloat


class Train(_Open):
    epochs: PositiveFloat
    batch_anchors: PositiveInt


class Setup(_Open):
    chain: str
    walk: str
    budget: str
    train: Train


class Results(_Open):
    """The results of a study, schema ``redraft.study/1``: every cell has the rounds of its target's prompts."""

    name: str
    about: str
    finished: bool
    config: Config
    setup: Setup
    targets: dict[str, Facts] = Field(min_length=1)
    cells: list[Record]

    @model_validator(mode="after")
    def _whole(self) -> Results:
        for cell in self.cells:
            if cell.target not in self.targets:
                raise ValueError(f"cell {cell.key} is of the target {cell.target!r}, which is not there")
            for name, rounds in cell.rounds.items():
                asked = self.targets[cell.target].sets.get(name)
                if asked is None or len(asked.tokens) != len(rounds):
                    raise ValueError(f"cell {cell.key} has {len(rounds)} prompts in {name}, and its target others")
        return self


class Scored(_Open):
    """The scores of a set of texts, by row."""

    scores: dict[str, FiniteFloat]
    flops: NonNegativeInt
    seconds: NonNegativeFloat


def read_results(path: Path) -> dict[str, Any]:
    """The results of a study. Raises ``UserError`` as above, and for another schema."""
    found = read_json(path, finite=False)
    if found.get("schema") != SCHEMA:
        raise UserError(f"{path}: no results of a study (schema {found.get('schema')!r}, expected {SCHEMA!r})")
    typed(Results, found, str(path), "copy the file again")
    if not found["cells"]:
        raise UserError(f"{path} has no cells, and a study that wrote results has some; copy the file again")
    return found
