"""``rejection``: how much of each sample the present draft gets wrong."""

from __future__ import annotations

from collections.abc import Sequence

from redraft.registries import SCORERS
from redraft.rows import TokenRow
from redraft.selection import PromptRow, Scorer, ScoringContext


@SCORERS.register("rejection")
class Rejection(Scorer):
    """1 - alpha of the present draft on the row, alpha as defined in ``redraft.metrics``: the mean over positions
    of sum_x min(target, draft), one minus the total variation distance (arXiv 2211.17192).

    The draft is teacher-forced: on the tokens of the response, or on those of a prompt without one. A draft guesses
    from the third token of a text on, so a prompt of two tokens holds nothing to reject and scores 0.
    """

    name = "rejection"
    needs = frozenset({"alpha_of"})
    passes = 1

    def score(self, rows: Sequence[TokenRow], context: ScoringContext) -> list[float]:
        """Raises ``ValueError`` when the caller's acceptance is not a probability: it measured something else."""
        assert context.alpha_of is not None  # in ``needs``
        forced = [row if row.response_ids else force_prompt(row) for row in rows]
        guessed = [row for row in forced if len(row.response_ids) > 1]
        alphas = dict.fromkeys((row.key for row in rows), 1.0)
        found = context.alpha_of(guessed) if guessed else []
        for row, alpha in zip(guessed, found, strict=True):
            if not -1e-4 <= alpha <= 1 + 1e-4:
                raise ValueError(f"acceptance {alpha} of row {row.key} is not between 0 and 1")
            alphas[row.key] = float(alpha)
        return [1 - alphas[row.key] for row in rows]


def force_prompt(row: TokenRow) -> PromptRow:
    """The prompt of ``row``, split behind its first token."""
    ids = list(row.prompt_ids)
    return PromptRow(row.key, ids[:1], ids[1:])
