"""What a draft may start from: nearly free adaptations without a gradient, alone or before training.

One file a start: ``none`` leaves the stale draft, ``vocabulary`` swaps tokens that the fine-tuned target does not use
for those it does; others are in ``redraft.attic``. They combine in the order they are written: ``vocabulary+ridge``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from redraft.data.store import Row
from redraft.errors import UserError
from redraft.registries import STARTS
from redraft.settings.texts import parse_start
from redraft.target import Target


@dataclass(frozen=True)
class StartContext:
    """What starts may use. ``target`` is the fine-tuned target, its head alone where no start runs it. ``rows`` are its
    responses, ``general_rows`` text of the domain that the draft must stay good at; ``progress`` is called with the
    tokens that went through each target."""

    target: Any
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

    ``run`` leaves the draft it is given as it is. ``runs_target`` is false where it reads the target's head alone.
    """

    needs: frozenset[str]
    about: str
    run: Callable[[Any, StartContext], StartResult]
    runs_target: bool = True


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
