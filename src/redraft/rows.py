"""Stored responses as rows of token ids: how many positions of one can be supervised, and which share a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from redraft.errors import UserError

MOST_PADDING = 0.06
ENOUGH_TOKENS = 512


class TokenRow(Protocol):
    """A prompt and its response as token ids, under a key that no other row has."""

    @property
    def key(self) -> str: ...

    @property
    def prompt_ids(self) -> Sequence[int]: ...

    @property
    def response_ids(self) -> Sequence[int]: ...


AnyRow = TypeVar("AnyRow", bound=TokenRow)


def sizes(row: TokenRow) -> tuple[int, int]:
    """Tokens of the prompt and of the response; a row that lies on the disk says them without being read."""
    found: tuple[int, int] | None = getattr(row, "sizes", None)
    return (len(row.prompt_ids), len(row.response_ids)) if found is None else found


def anchors(row: TokenRow) -> int:
    """How many positions of a row can be supervised: all response tokens but the first, which prefill gives."""
    return max(0, sizes(row)[1] - 1)


@dataclass(frozen=True)
class Span:
    """Some supervised positions of a row, ``count`` from number ``start`` on, with all that stands in front of them: to
    whoever asks, a row under the key of the whole one, whose prompt goes on to where the span begins."""

    row: TokenRow
    start: int
    count: int

    @property
    def key(self) -> str:
        return self.row.key

    @property
    def prompt_ids(self) -> Sequence[int]:
        return [*self.row.prompt_ids, *self.row.response_ids[: self.start]]

    @property
    def response_ids(self) -> Sequence[int]:
        return self.row.response_ids[self.start : self.start + self.count + 1]


def span_of(row: TokenRow) -> Span:
    """The row as a span: one of its own, or the whole."""
    return row if isinstance(row, Span) else Span(row, 0, anchors(row))


def cut(rows: Sequence[AnyRow], longest: int) -> list[AnyRow | Span]:
    """Rows in their order; one with more supervised positions than ``longest`` as spans of nearly equal length, which
    hold each of its positions once."""
    found: list[AnyRow | Span] = []
    for row in rows:
        total = anchors(row)
        parts = -(-total // longest)
        ends = [total * part // parts for part in range(parts + 1)] if parts > 1 else []
        found += [Span(row, a, b - a) for a, b in zip(ends, ends[1:], strict=False)] or [row]
    return found


def whole_length(row: TokenRow) -> int:
    """Tokens of the prompt and the response."""
    return sum(sizes(row))


def groups(rows: Sequence[AnyRow], limit: int, weigh: Callable[[AnyRow], int]) -> list[list[AnyRow]]:
    """Rows in their order, in groups that weigh at most ``limit``; a row that weighs more stands alone."""
    found: list[list[AnyRow]] = []
    held = 0
    for row in rows:
        if not found or held + weigh(row) > limit:
            found.append([])
            held = 0
        found[-1].append(row)
        held += weigh(row)
    return found


def anchor_batches(rows: Sequence[AnyRow], batch_anchors: int) -> list[list[AnyRow]]:
    """Rows of similar length together, at most ``batch_anchors`` supervised positions a batch.

    Rows of equal length keep the order they are given in; rows without an anchor are left out.
    """
    return groups(sorted(filter(anchors, rows), key=whole_length), batch_anchors, anchors)


def length_batches(rows: Sequence[AnyRow], batch_tokens: int) -> Iterator[list[AnyRow]]:
    """Rows of similar length together, at most ``batch_tokens`` padded tokens a batch.

    A batch that is large enough to keep the machine busy is closed before a row that would pad the others by more
    than ``MOST_PADDING``.
    """
    batch: list[AnyRow] = []
    held = 0
    for row in sorted(rows, key=lambda r: (whole_length(r), r.key)):
        longest = whole_length(row)
        padded = len(batch) * longest > (1 + MOST_PADDING) * held and held >= ENOUGH_TOKENS
        if batch and (padded or (len(batch) + 1) * longest > batch_tokens):
            yield batch
            batch, held = [], 0
        batch.append(row)
        held += longest
    if batch:
        yield batch


def mix(rows: Sequence[AnyRow], general_rows: Sequence[AnyRow], share: float, seed: int = 0) -> list[AnyRow]:
    """All of ``rows``, and behind them so many general ones that these hold ``share`` of all response tokens.

    So a draft keeps its speed on everything else. Response tokens are what training is paid for and learns from.
    Which general rows are taken depends on the seed and their keys alone: a larger share takes the same rows and more.
    As many are taken as come nearest to the share, at least one for a share above 0; both groups stay in their own
    order. Raises ``UserError`` for a share outside [0, 1), no rows, a key that is in both groups, and general rows
    that hold too few tokens.
    """
    if not 0 <= share < 1:
        raise UserError(f"the share of general text must be at least 0 and below 1, not {share}")
    if not rows:
        raise UserError("there are no rows to mix general text into; regenerate some first")
    if share == 0:
        return list(rows)
    twice = {row.key for row in rows} & {row.key for row in general_rows}
    if twice:
        raise UserError(f"{len(twice)} rows are in both the data and the general text, first {min(twice)}; rename ids")
    wanted = share / (1 - share) * sum(sizes(row)[1] for row in rows)
    held = sum(sizes(row)[1] for row in general_rows)
    if held < wanted:
        raise UserError(
            f"a share of {share:.3g} needs {wanted:,.0f} tokens of general responses and there are {held:,}; "
            "give more general rows or a smaller share"
        )
    ranked = sorted(general_rows, key=lambda row: hashlib.sha256(f"{seed}|{row.key}".encode()).digest())
    taken: set[str] = set()
    tokens = 0
    for row in ranked:
        size = sizes(row)[1]
        # Over by less than short by is nearer; the first row is taken whatever its size.
        if taken and tokens + size - wanted > wanted - tokens:
            break
        taken.add(row.key)
        tokens += size
    return [*rows, *(row for row in general_rows if row.key in taken)]
