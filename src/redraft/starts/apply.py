"""What a draft may start from: nearly free adaptations without a gradient, alone or before training.

``none`` leaves the stale draft; ``ridge`` re-solves ``fc``; ``delta`` moves head rows by the target's own change;
``vocabulary`` swaps tokens that the fine-tuned target does not use for those it does. They combine in the order they
are written: ``vocabulary+ridge``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from redraft import provenance
from redraft.data.store import Row
from redraft.errors import UserError
from redraft.registries import STARTS
from redraft.starts.delta import delta
from redraft.starts.ridge import ridge
from redraft.starts.vocabulary import refresh_vocabulary
from redraft.target import Target


@dataclass(frozen=True)
class StartContext:
    """What starts may use. ``rows`` are responses of the fine-tuned ``target``, ``general_rows`` text of the domain
    that the draft must stay good at; ``progress`` is called with the tokens that went through each target."""

    target: Target
    base_target: Target | None = None
    rows: Sequence[Row] = ()
    general_rows: Sequence[Row] = ()
    gamma: int = 5
    seed: int = 0
    progress: Callable[[int], None] | None = None


@dataclass(frozen=True)
class StartResult:
    """A started draft. ``changed`` names the tensors of its state that differ from the old draft's: a private file on
    the old draft must hold them beside what is trained. ``tokens`` and ``flops`` are what it cost in forward passes."""

    draft: Any
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tokens: int = 0
    flops: int = 0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """One way to start: what it needs of the context ("base_target", "rows") and what it does, in words and in code.

    ``run`` leaves the draft it is given as it is.
    """

    needs: frozenset[str]
    about: str
    run: Callable[[Any, StartContext], StartResult]


# Each row goes through two targets, and fc has far fewer weights than so many rows have features.
RIDGE_ROWS = 300


def spread(rows: Sequence[Row], most: int) -> Sequence[Row]:
    """At most ``most`` rows, evenly spread over all in the order of their keys."""
    if len(rows) <= most:
        return rows
    ordered = sorted(rows, key=lambda row: row.key)
    return [ordered[place * len(rows) // most] for place in range(most)]


def _none(draft: Any, context: StartContext) -> StartResult:
    return StartResult(draft)


def _ridge(draft: Any, context: StartContext) -> StartResult:
    assert context.base_target is not None
    rows = spread(context.rows, RIDGE_ROWS)
    found, report = ridge(draft, context.target, context.base_target, rows, progress=context.progress)
    flops = 2 * provenance.forward_flops(context.target.parameters_per_token, report.tokens)
    details = {"errors": {f"{ratio:g}": error for ratio, error in report.errors.items()}, "ratio": report.ratio}
    return StartResult(found, report.changed, report.notes, 2 * report.tokens, flops, details)


def _delta(draft: Any, context: StartContext) -> StartResult:
    moved, report = delta(draft, context.target, context.base_target, context.seed)
    maps = {name: {"kind": m.kind, "errors": m.errors, "step": m.step} for name, m in report.maps.items()}
    return StartResult(moved, report.changed, report.notes, details=maps)


def _vocabulary(draft: Any, context: StartContext) -> StartResult:
    renewed, report = refresh_vocabulary(
        draft, context.target, context.rows, context.general_rows, context.gamma, context.seed
    )
    details = {
        "replaced": len(report.added),
        "before": report.before.to_dict(worst=0),
        "after": report.after.to_dict(worst=0),
        "map": report.rows and {"kind": report.rows.kind, "errors": report.rows.errors},
    }
    return StartResult(renewed, report.changed, report.notes, details=details)


STARTS.register("none")(Start(frozenset(), "the stale draft as it is", _none))
STARTS.register("ridge")(
    Start(frozenset({"base_target", "rows"}), "fc re-solved so that features land where the base's did", _ridge)
)
STARTS.register("delta")(Start(frozenset({"base_target"}), "head rows moved by the target's own change", _delta))
STARTS.register("vocabulary")(
    Start(frozenset({"rows"}), "unused tokens of the draft swapped for those the target uses", _vocabulary)
)


def parse_start(text: str) -> list[str]:
    """The names in ``ridge`` or ``vocabulary+ridge``. Raises ``UserError`` for an unknown name or one given twice."""
    names = [part.strip() for part in text.split("+")]
    for name in names:
        STARTS.get(name)
    if len(set(names)) < len(names):
        raise UserError(f"start {text!r} names a start twice; give each once")
    return names


def start_needs(text: str) -> frozenset[str]:
    """What the starts that ``text`` names need of the context. Raises ``UserError`` for an unknown name."""
    return frozenset().union(*(STARTS.get(name).needs for name in parse_start(text)))


def apply_start(text: str, draft: Any, context: StartContext) -> StartResult:
    """Run the starts that ``text`` names, one after the other; ``draft`` itself stays as it is.

    Raises ``UserError`` for an unknown name or a need that is not met, before anything is computed.
    """
    names = parse_start(text)
    for name in names:
        missing = sorted(need for need in STARTS.get(name).needs if not getattr(context, need))
        if missing:
            words = {"base_target": "the base target (--base-target)", "rows": "responses of the fine-tuned target"}
            raise UserError(f"start {name} needs {' and '.join(words[need] for need in missing)}")
    total = StartResult(draft)
    for name in names:
        one = STARTS.get(name).run(total.draft, context)
        total = StartResult(
            one.draft,
            tuple(dict.fromkeys([*total.changed, *one.changed])),
            (*total.notes, *one.notes),
            total.tokens + one.tokens,
            total.flops + one.flops,
            total.details | ({name: one.details} if one.details else {}),
        )
    return total
