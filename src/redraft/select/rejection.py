"""``rejection``: how much of each sample the present draft gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redraft.select import SCORERS, ScorableRow, ScoringContext


@SCORERS.register("rejection")
class Rejection:
    """1 - alpha of the present draft on the row, alpha as defined in ``redraft.metrics``: the mean over positions
    of sum_x min(target, draft), one minus the total variation distance (arXiv 2211.17192)."""

    name = "rejection"
    needs = frozenset({"alpha_of"})
    passes = 1

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def score(self, rows: Sequence[ScorableRow], context: ScoringContext) -> list[float]:
        """Raises ``ValueError`` when the caller's acceptance is not a probability: it measured something else."""
        assert context.alpha_of is not None  # in ``needs``
        alphas = [float(alpha) for alpha in context.alpha_of(rows)]
        for row, alpha in zip(rows, alphas, strict=True):
            if not -1e-4 <= alpha <= 1 + 1e-4:
                raise ValueError(f"acceptance {alpha} of row {row.key} is not between 0 and 1")
        return [1 - alpha for alpha in alphas]
