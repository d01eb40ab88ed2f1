"""``random``: the control that every other scorer must beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from redraft.select import SCORERS, ScorableRow, ScoringContext


@SCORERS.register("random")
class Random:
    """A number in [0, 1) from the seed and the row's key, so a row's score depends on no other row."""

    name = "random"
    needs: frozenset[str] = frozenset()
    passes = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def score(self, rows: Sequence[ScorableRow], context: ScoringContext) -> list[float]:
        return [_uniform(f"{context.seed}|{row.key}") for row in rows]


def _uniform(text: str) -> float:
    """53 bits of a hash as a float in [0, 1)."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53
