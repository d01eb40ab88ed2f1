"""Budgets, and the rule that turns scores and a budget into a selection.

A budget is written as a fraction (``25%``, ``0.25``), as a number of rows (``400``, ``4k``) or as a number of
tokens (``60000 tokens``, ``60k tokens``). A plain whole number is rows; ``1.0`` and ``100%`` are everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from redraft.errors import UserError
from redraft.selection import ScorableRow, Scorer, ScoringContext, explained_scores, scored_tokens
from redraft.selection.manifest import Entry, Manifest, file_hash
from redraft.settings.texts import Budget, parse_budget

Order = Literal["highest", "lowest"]


def choose(
    scorer: Scorer,
    rows: Sequence[ScorableRow],
    context: ScoringContext,
    budget: Budget | str,
    order: Order = "highest",
    source: str | Path | None = None,
) -> Manifest:
    """Score the rows and select from them, with the scorer's own account of each number in the manifest.

    See :func:`redraft.selection.explained_scores` and :func:`select` for what is checked and raised.
    """
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    check_order(order)
    found = explained_scores(scorer, rows, context)
    scores, notes = [score for score, _ in found], [note for _, note in found]
    about: dict[str, Any] = {"scorer": scorer.name, "settings": scorer.settings, "source": source}
    return select(rows, scores, budget, order, notes=notes, **about)


def check_order(order: str) -> None:
    """Raise ``UserError`` for an end of the scores that does not exist."""
    if order not in ("highest", "lowest"):
        raise UserError(f"unknown order {order!r}; choose highest or lowest")


def select(
    rows: Sequence[ScorableRow],
    scores: Sequence[float],
    budget: Budget | str,
    order: Order = "highest",
    *,
    scorer: str = "",
    settings: dict[str, Any] | None = None,
    source: str | Path | None = None,
    notes: Sequence[str | None] | None = None,
) -> Manifest:
    """Rank the rows and take them from the top until the budget is used up.

    ``order`` says which end of the scores is the top; equal scores are ranked by key, so the order of the rows
    changes nothing. A budget of tokens stops before the first row that would overrun it; what counts is the
    response, or the prompt of a row without one. ``source`` is the file of the rows, whose hash is recorded;
    ``notes`` are what the scorer has to say about each number, recorded behind the reason.
    Raises ``UserError`` when nothing is selected, ``ValueError`` for a score that is not finite: it has no rank.
    """
    if not all(map(math.isfinite, scores)):
        raise ValueError("scores must be finite")
    check_order(order)
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    sign = -1 if order == "highest" else 1
    noted = zip(rows, scores, notes or [None] * len(rows), strict=True)
    ranked = sorted(noted, key=lambda found: (sign * found[1], found[0].key))
    sizes = [scored_tokens(row) for row, _, _ in ranked]
    taken = _how_many(budget, sizes)
    entries = []
    for rank, (row, score, note) in enumerate(ranked, start=1):
        reason = "; ".join(filter(None, [_reason(budget, rank, taken, sizes), note]))
        entries.append(Entry(row.key, float(score), rank, sizes[rank - 1], rank <= taken, reason))
    return Manifest(
        scorer=scorer,
        settings=dict(settings or {}),
        budget={"text": budget.text, "kind": budget.kind, "amount": float(budget.amount)},
        order=order,
        source=str(source) if source is not None else None,
        source_sha256=file_hash(source) if source is not None else None,
        entries=entries,
    )


def _how_many(budget: Budget, sizes: Sequence[int]) -> int:
    """Length of the ranked prefix that the budget allows; ``UserError`` when it is empty."""
    if not sizes:
        raise UserError("there are no rows to select from; regenerate some first")
    allowed = budget.rows_of(len(sizes))
    if allowed is None:
        allowed, used = 0, 0
        for size in sizes:
            used += size
            if used > budget.amount:
                break
            allowed += 1
        if not allowed:
            raise UserError(f"budget {budget.text!r} selects nothing: the first row alone has {sizes[0]} tokens")
    if not allowed:
        raise UserError(f"budget {budget.text!r} selects nothing of {len(sizes)} rows; raise it")
    return allowed


def _reason(budget: Budget, rank: int, taken: int, sizes: Sequence[int]) -> str:
    where = f"rank {rank} of {len(sizes)}"
    if rank <= taken:
        return f"{where}, within the budget of {budget.text} ({taken} rows)"
    if budget.kind == "tokens" and rank == taken + 1:
        total = sum(sizes[:rank])
        return f"{where}, would bring the selection to {total} tokens, over the budget of {budget.text}"
    return f"{where}, after the budget of {budget.text} was used up ({taken} rows)"
