"""``length``: the control for scorers that only seem to choose well because they choose long samples."""

from __future__ import annotations

from collections.abc import Sequence

from redraft.registries import SCORERS
from redraft.rows import TokenRow
from redraft.selection import Scorer, ScoringContext, scored_tokens


@SCORERS.register("length")
class Length(Scorer):
    """Tokens of the response, or of the prompt when there is no response."""

    name = "length"

    def score(self, rows: Sequence[TokenRow], context: ScoringContext) -> list[float]:
        return [float(scored_tokens(row)) for row in rows]
