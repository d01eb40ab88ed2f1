"""Reads the JSON that other rooms write, and says what is wrong with it in one line.

The classes state only what a report needs; unknown fields pass through, so that a result may grow without
breaking the page.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from redraft.errors import UserError
from redraft.inputs import json_lines, read_json, there, typed
from redraft.places import without_secrets
from redraft.seals import unsealed

BENCH_SCHEMA = "redraft.bench/1"

Model = TypeVar("Model", bound=BaseModel)


class _Open(BaseModel, extra="allow", allow_inf_nan=False):
    """Base of every record: unknown fields are kept, and a figure is a finite number."""


def _there(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


# A figure that may not exist: null, and in files of older versions NaN.
Figure = Annotated[float | None, BeforeValidator(_there)]


class Interval(_Open):
    """A figure with the two ends of its 95% interval; both ends are null where none could be had."""

    value: float
    low: Figure
    high: Figure

    @model_validator(mode="after")
    def _has_both(self) -> Interval:
        if (self.low is None) != (self.high is None):
            raise ValueError("one end of the interval is a number and the other is none")
        return self


class PhaseSeconds(_Open):
    """Seconds of one benchmark run, by what they were spent on."""

    draft: float = Field(ge=0)
    verify: float = Field(ge=0)
    other: float
    prefill: float = Field(default=0.0, ge=0)


class TaskResult(_Open):
    """One draft on the prompts of one task."""

    prompts: int = Field(ge=0)
    tau_pooled: Interval
    speedup: Interval | None = None
    tokens_per_second: Interval | None = None
    plain_tokens_per_second: Interval | None = None


class Mbsu(_Open):
    """tau / (c gamma + 1) and the relative cost c of a draft step that it was taken with."""

    value: float
    cost: float | None = None


class Divergence(_Open):
    """How often the text left plain decoding's, and how close the two best logits were where it first did."""

    prompts: int = Field(ge=0)
    identical: int = Field(ge=0)
    near_ties: int = Field(ge=0)
    first_divergence_gap: list[float] = []


class Score(_Open):
    """A task's score: ``correct`` of ``scored`` answers.

    Against plain decoding: the paired ``difference`` of the scores, and on how many prompts the verdict ``changed``.
    """

    scored: int = Field(ge=0)
    correct: int = Field(ge=0)
    score: Interval | None = None
    rule: str | None = None
    difference: Interval | None = None
    changed: int | None = None


class DraftResult(_Open):
    """One draft's measurements. ``acceptance_*`` hold one probability a drafted position.

    ``compared`` prompts are in the figures, where some were not answered; all of them otherwise. ``speedup`` is absent
    without a plain baseline, ``time`` where the engine does not tell what a round's time went to.
    """

    dtype: str = ""
    parameters: int | None = None
    tau_pooled: Interval
    tau_macro: Interval | None = None
    alpha: Interval | None = None
    acceptance_conditional: list[Figure] = []
    acceptance_unconditional: list[Figure] = []
    tokens_per_second: Interval | None = None
    speedup: Interval | None = None
    ideal_speedup: float | None = None
    time: PhaseSeconds | None = None
    rounds: int = Field(gt=0)
    tokens: int = Field(gt=0)
    identical_to_plain: int | None = None
    compared: int | None = None
    by_task: dict[str, TaskResult] = {}
    mbsu: dict[str, Mbsu] = {}
    divergence: Divergence | None = None
    quality: dict[str, Score] = {}
    plain_quality: dict[str, Score] = {}


class Plain(_Open):
    """Plain decoding by number format; ``fastest`` names the one that speed-ups are measured against.

    ``relative`` are the others' speeds over its, on the few prompts that both decoded in turns.
    """

    fastest: str
    rates: dict[str, Interval]
    relative: dict[str, Interval] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "rates" in data:
            return data
        named = {name: entry for name, entry in data.items() if isinstance(entry, dict)}
        rates = {name: entry["tokens_per_second"] for name, entry in named.items() if "tokens_per_second" in entry}
        relative = {name: entry["relative"] for name, entry in named.items() if "relative" in entry}
        return {"fastest": data.get("fastest"), "rates": rates, "relative": relative}

    @model_validator(mode="after")
    def _known(self) -> Plain:
        if self.fastest not in self.rates:
            raise ValueError(f"'fastest' names {self.fastest!r}, which was not measured")
        return self

    @property
    def tokens_per_second(self) -> Interval:
        """The rate of the fastest plain decoding."""
        return self.rates[self.fastest]

    def over_fastest(self, name: str) -> float:
        """The speed of a number format over the fastest's."""
        if name in self.relative:
            return self.relative[name].value
        return self.rates[name].value / self.tokens_per_second.value


class Setup(_Open):
    """What was run: target, sampler and shape of the proposal. ``shape`` is ``chain`` (of ``gamma``) or a sentence."""

    target: str
    sampler: str
    gamma: int | None = Field(default=None, gt=0)
    shape: str = "chain"
    picked: str | None = None
    server: str | None = None
    order: str | None = None
    overhead: float | None = None
    prompts: int
    max_new_tokens: int
    batch: int = 1
    seed: int = 0


class TraceRound(_Open):
    """One round of a trace: of ``kept`` tokens the first ``accepted`` are the draft's, one more is the target's."""

    accepted: int = Field(ge=0)
    kept: int = Field(ge=0)
    full: bool
    proposed: list[str] = []


class TraceDraft(_Open):
    """One draft's decoding of one prompt: the pieces of text in order, the first from prefill, and the rounds."""

    tokens: list[str]
    rounds: list[TraceRound]

    @model_validator(mode="after")
    def _adds_up(self) -> TraceDraft:
        given = 1 + sum(r.kept for r in self.rounds)
        if len(self.tokens) != given and (self.tokens or self.rounds):
            raise ValueError(f"{len(self.tokens)} tokens, but prefill and rounds gave {given}")
        if any(r.kept > r.accepted + 1 for r in self.rounds):
            raise ValueError("a round kept more than its accepted tokens and one by the target")
        return self


class Trace(_Open):
    """A prompt, and what each draft's rounds made of it."""

    id: str
    task: str | None = None
    prompt: str = ""
    drafts: dict[str, TraceDraft] = Field(min_length=1)


class Spread(_Open):
    """Mean, median and 99th percentile over requests, in milliseconds."""

    mean: float
    p50: float
    p99: float


class Load(_Open):
    """One contestant at one concurrency. ``ttft`` is the median time to the first token, in seconds."""

    tokens_per_second: Interval
    speedup: Interval | None = None
    ttft: Interval | None = None
    ttft_ms: Spread | None = None
    inter_token_ms: Spread | None = None
    tau: Interval | None = None
    requests: int | None = None
    failed: int | None = None


class Level(_Open):
    """One concurrency: how every contestant did with that many requests under way."""

    concurrency: int = Field(gt=0)
    contestants: dict[str, Load]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "contestants" in data:
            return data
        found = {name: entry for name, entry in data.items() if isinstance(entry, dict)}
        return {"concurrency": data.get("concurrency"), "contestants": found}


class Server(_Open):
    """The server benchmark: levels of concurrency in ascending order."""

    levels: list[Level] = Field(min_length=1)
    notes: list[str] = []
    failures: list[dict[str, Any]] = []


class PromptFigures(_Open):
    """How one prompt was decoded."""

    tokens: int | None = None
    rounds: int | None = None
    seconds: float | None = None


class PromptEntry(_Open):
    """What was measured on one prompt, as far as the page's table asks."""

    id: str = ""
    task: str | None = None
    plain: PromptFigures | None = None
    drafts: dict[str, PromptFigures | None] | None = None


def _as_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry as it is, where its figures are figures."""
    PromptEntry(**entry)
    return entry


class BenchResult(_Open):
    """A whole benchmark result, schema ``redraft.bench/1``. ``plain`` is absent where no baseline was measured."""

    setup: Setup
    plain: Plain | None = None
    drafts: dict[str, DraftResult]
    gains: dict[str, dict[str, Interval]] = {}
    per_prompt: list[Annotated[dict[str, Any], AfterValidator(_as_entry)]] = []
    plain_quality: dict[str, Score] = {}
    traces: list[Trace] = []
    server: Server | None = None
    provenance: dict[str, Any] = {}


class Summary(_Open):
    """The quickstart's summary. ``tau_full_from`` says so when ``full`` was measured in another run."""

    tau: dict[str, float | None]
    tau_full_from: str | None = None
    speedup: dict[str, float | None]
    trained_fraction_of_full: float | None = None
    minutes: float | None = None
    provenance: dict[str, Any] = {}


class Guard(_Open):
    """Held-out tau of the old draft and of the new one, and which of the two was kept."""

    old: float
    new: float
    gamma: int
    prompts: int
    kept: str


class CurvePoint(_Open):
    """One logged step of training; step 0, before any, has no loss."""

    step: int = Field(ge=0)
    loss: float | None = None
    tokens: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    heldout_tau: float | None = None


class Stage(_Open):
    """One stage of the cost ledger."""

    stage: str
    tokens: int | None = Field(default=None, ge=0)
    flops: float | None = Field(default=None, ge=0)
    formula: str | None = None
    seconds: float | None = Field(default=None, ge=0)
    peak_memory_bytes: int | None = Field(default=None, ge=0)
    bytes_written: int | None = Field(default=None, ge=0)


class Costs(_Open):
    """The cost ledger."""

    stages: list[Stage]


def parse(model: type[Model], data: Any, where: str) -> Model:
    """``data`` as ``model``. Raises ``UserError`` with ``where`` and the first field that does not fit."""
    return typed(model, data, where, "measure again, or copy the file again")


def read_bench(path: Path) -> BenchResult:
    """A benchmark result. Raises ``UserError`` for an unreadable file, another schema or a missing field."""
    if (inside := Path(path) / "bench.json").is_file():
        raise UserError(f"{path} is a run directory; its benchmark is {inside}")
    data = read_json(path, finite=False)
    schema = data.get("schema")
    if schema != BENCH_SCHEMA:
        raise UserError(
            f"{path}: schema is {schema!r}, this redraft reads {BENCH_SCHEMA!r}; measure again with `redraft bench`"
        )
    if data.get("drafts") == {}:
        raise UserError(
            f"{path}: it has no drafts, only plain decoding, and a page shows drafts; measure one beside it"
        )
    return parse(BenchResult, {key: _shown(data[key]) if key in ADDRESSED else data[key] for key in data}, str(path))


# The parts of a result that hold command lines and addresses; older versions kept passwords in them.
ADDRESSED = ("provenance", "server")


def _shown(value: Any) -> Any:
    """The JSON value without what may be secret in its texts."""
    if isinstance(value, dict):
        return {key: _shown(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return without_secrets(value) if isinstance(value, str) else value


def read_as(model: type[Model], path: Path) -> Model:
    """A file that holds a ``model``: a quickstart's summary, a cost ledger. Raises ``UserError`` when it does not."""
    return parse(model, read_json(path), str(path))


def read_curve(path: Path) -> list[CurvePoint]:
    """A training curve, one JSON object a line; a torn last line of a run in progress is left out.

    It begins at step 0, with the draft as it was: where no line says so, the run's state beside the curve does. A step
    that is there twice (a run that was killed between writing its line and its checkpoint, and resumed) counts once,
    as written last. Raises ``UserError`` with file and line for damage anywhere else.
    """
    points: dict[int, CurvePoint] = {}
    for number, data in json_lines(path, torn=True):
        plain = unsealed(data, f"{path}:{number}", "delete that line") if isinstance(data, dict) else data
        point = parse(CurvePoint, plain, f"{path}:{number}")
        if point.step and point.loss is None:
            raise UserError(f"{path}:{number}: loss: missing, which only step 0 may do without")
        points[point.step] = point
    before = _before(path) if any(point.heldout_tau is not None for point in points.values()) else None
    if before is not None:
        points.setdefault(0, CurvePoint(step=0, heldout_tau=before))
    return [points[step] for step in sorted(points)]


def _before(curve: Path) -> float | None:
    """The held-out tau before any training, from the run's state beside the curve; None where there is none. Raises
    ``UserError`` for a state that is damaged."""
    state = curve.with_name("state.json")
    if not there(state):
        return None
    try:
        (step, tau), *_ = read_json(state, finite=False)["state"]["history"]
        return float(tau) if step == 0 else None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{state} has no history of the training in it; copy it again, or move it away") from error
