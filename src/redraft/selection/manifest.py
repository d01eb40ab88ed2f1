"""What is selected, by which rule, and the record of it: every row's score and rank, whether it is in, and why."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from pydantic import FiniteFloat, PositiveInt, StrictBool

from redraft.artifact import read_json, read_sealed, write_sealed
from redraft.errors import UserError
from redraft.inputs import require_file, typed
from redraft.rows import AnyRow, TokenRow
from redraft.selection import Scorer, ScoringContext, explained_scores, scored_tokens
from redraft.settings.texts import Budget, parse_budget
from redraft.shown import Shown, lines

SCHEMA = "redraft.selection/1"
Order = Literal["highest", "lowest"]


@dataclass(frozen=True)
class Entry:
    """One row's fate. ``rank`` 1 is the top; ``tokens`` is what the row counts towards a budget of tokens."""

    key: str
    score: FiniteFloat
    rank: int
    tokens: PositiveInt
    selected: StrictBool
    reason: str


@dataclass(frozen=True)
class Manifest(Shown):
    """A selection and all that led to it. ``entries`` are in the order of rank."""

    scorer: str
    settings: dict[str, Any]
    budget: dict[str, Any]
    order: str
    source: str | None
    source_sha256: str | None
    entries: list[Entry]

    @property
    def selected_keys(self) -> list[str]:
        """Keys of the selected rows, best first."""
        return [entry.key for entry in self.entries if entry.selected]

    @property
    def selected_tokens(self) -> int:
        return sum(entry.tokens for entry in self.entries if entry.selected)

    def __rich__(self) -> Any:
        kept, total = len(self.selected_keys), len(self.entries)
        return lines(f"{kept} of {total} rows kept ({self.selected_tokens:,} tokens) by {self.scorer}")

    def apply(self, rows: Sequence[AnyRow]) -> list[AnyRow]:
        """The selected ones of ``rows``, in their own order. Raises ``UserError`` when a selected row is missing."""
        chosen = set(self.selected_keys)
        missing = sorted(chosen - {row.key for row in rows})
        if missing:
            raise UserError(
                f"{len(missing)} selected rows are not in the data, first {missing[0]}; "
                "the manifest belongs to other data: select again"
            )
        return [row for row in rows if row.key in chosen]

    def check_source(self, path: str | Path, mend: str = "select again") -> None:
        """Raise ``UserError`` that says ``mend`` unless ``path`` is the file, unchanged, that the selection was made
        from."""
        if self.source_sha256 is not None and file_hash(path) != self.source_sha256:
            raise UserError(f"{path} is not the file that this selection was made from; {mend}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with totals for a reader's eye."""
        head = asdict(self)
        entries = head.pop("entries")
        totals = {
            "rows": len(entries),
            "tokens": sum(entry.tokens for entry in self.entries),
            "selected_rows": len(self.selected_keys),
            "selected_tokens": self.selected_tokens,
        }
        return {"schema": SCHEMA, **head, "totals": totals, "entries": entries}

    def write(self, path: str | Path, run: str = "") -> None:
        """Write as JSON, whole or not at all; ``run`` marks the run that it is for. Raises ``UserError`` when the disk
        cannot take it."""
        write_sealed(path, self.to_dict(), SCHEMA, run)


def read_manifest(path: str | Path, run: str | None = None) -> Manifest:
    """Read what :meth:`Manifest.write` wrote.

    Raises ``UserError`` when the file is missing, damaged, another kind's or, with ``run``, another run's.
    """
    stored = read_json(path) if run is None else read_sealed(path, SCHEMA, run, "delete it to select again")
    if stored.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a selection manifest (schema {stored.get('schema')!r}, expected {SCHEMA!r})")
    found = typed(Manifest, stored, f"{path} is damaged", "select again")
    if [entry.rank for entry in found.entries] != list(range(1, len(found.entries) + 1)):
        raise UserError(f"{path} is damaged: its entries are not what redraft writes; select again")
    return found


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes in hex. Raises ``UserError`` when it cannot be read."""
    require_file(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


# -- the rule ----------------------------------------------------------------------------------------------------------
def choose(
    scorer: Scorer,
    rows: Sequence[TokenRow],
    context: ScoringContext,
    budget: str,
    order: Order = "highest",
    source: str | Path | None = None,
) -> Manifest:
    """Score the rows and select from them, with the scorer's own account of each number in the manifest.

    See :func:`redraft.selection.explained_scores` and :func:`select` for what is checked and raised.
    """
    parse_budget(budget)
    check_order(order)
    scores, notes = zip(*explained_scores(scorer, rows, context), strict=True)
    about: dict[str, Any] = {"scorer": scorer.name, "settings": scorer.settings, "source": source}
    return select(rows, scores, budget, order, notes=notes, **about)


def check_order(order: str) -> None:
    """Raise ``UserError`` for an end of the scores that does not exist."""
    if order not in ("highest", "lowest"):
        raise UserError(f"unknown order {order!r}; choose highest or lowest")


def select(
    rows: Sequence[TokenRow],
    scores: Sequence[float],
    budget: str,
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
    allowed, sign = parse_budget(budget), -1 if order == "highest" else 1
    noted = zip(rows, scores, notes or [None] * len(rows), strict=True)
    ranked = sorted(noted, key=lambda found: (sign * found[1], found[0].key))
    sizes = [scored_tokens(row) for row, _, _ in ranked]
    taken = _how_many(allowed, sizes)
    entries = []
    for rank, (row, score, note) in enumerate(ranked, start=1):
        reason = "; ".join(filter(None, [_reason(allowed, rank, taken, sizes), note]))
        entries.append(Entry(row.key, float(score), rank, sizes[rank - 1], rank <= taken, reason))
    return Manifest(
        scorer,
        dict(settings or {}),
        {"text": allowed.text, "kind": allowed.kind, "amount": float(allowed.amount)},
        order,
        None if source is None else str(source),
        None if source is None else file_hash(source),
        entries,
    )


def _how_many(budget: Budget, sizes: Sequence[int]) -> int:
    """Length of the ranked prefix that the budget allows; ``UserError`` when it is empty."""
    if not sizes:
        raise UserError("there are no rows to select from; regenerate some first")
    allowed = budget.rows_of(len(sizes))
    if allowed is None:
        allowed = sum(used <= budget.amount for used in accumulate(sizes))
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
