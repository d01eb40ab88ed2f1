"""``random``: the control that every other scorer must beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from redraft.registries import SCORERS
from redraft.rows import TokenRow
from redraft.selection import Scorer, ScoringContext


@SCORERS.register("random")
class Random(Scorer):
    """A number in [0, 1) from the seed and the row's key, so a row's score depends on no other row.

    ``seed`` is that of the whole run unless it is given, which draws several samples in one run.
    """

    name = "random"

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.seed is None else {"seed": self.seed}

    def score(self, rows: Sequence[TokenRow], context: ScoringContext) -> list[float]:
        seed = context.seed if self.seed is None else self.seed
        return [_uniform(f"{seed}|{row.key}") for row in rows]


def _uniform(text: str) -> float:
    """53 bits of a hash as a float in [0, 1)."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53
