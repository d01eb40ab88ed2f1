"""``length``: the control for scorers that only seem to choose well because they choose long samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redraft.registries import SCORERS
from redraft.selection import ScorableRow, ScoringContext, scored_tokens


@SCORERS.register("length")
class Length:
    """Tokens of the response, or of the prompt when there is no response."""

    name = "length"
    needs: frozenset[str] = frozenset()
    passes = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def score(self, rows: Sequence[ScorableRow], context: ScoringContext) -> list[float]:
        return [float(scored_tokens(row)) for row in rows]
