"""Stored responses as rows of token ids: how many positions of one can be supervised, and which share a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

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


def anchors(row: TokenRow) -> int:
    """How many positions of a row can be supervised: all response tokens but the first, which prefill gives."""
    return max(0, len(row.response_ids) - 1)


def whole_length(row: TokenRow) -> int:
    """Tokens of the prompt and the response."""
    return len(row.prompt_ids) + len(row.response_ids)


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
