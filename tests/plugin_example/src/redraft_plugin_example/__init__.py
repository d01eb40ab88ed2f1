"""What a package of its own can add to redraft. Importing it registers everything; its entry point does so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from redraft.losses.rows import computing_dtype, weighted_sum
from redraft.registries import LOSSES, SCORERS, STARTS
from redraft.rows import TokenRow
from redraft.selection import ScoringContext
from redraft.starts.apply import Start, StartContext, StartResult


@LOSSES.register("hellinger")
def hellinger(draft_logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squared Hellinger distance, 1 - sum_x sqrt(target(x) draft(x)), its gradient left to autograd."""
    dtype = computing_dtype(draft_logits, teacher_logits)
    draft, target = draft_logits.to(dtype).softmax(-1), teacher_logits.to(dtype).softmax(-1)
    return weighted_sum(1 - (draft.sqrt() * target.sqrt()).sum(-1), weights)


@SCORERS.register("prompt-length")
class PromptLength:
    """Longer prompts first."""

    name = "prompt-length"
    needs: frozenset[str] = frozenset()
    passes = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def score(self, rows: Sequence[TokenRow], context: ScoringContext) -> list[float]:
        """The number of tokens of each row's prompt."""
        return [float(len(row.prompt_ids)) for row in rows]


def same(draft: Any, context: StartContext) -> StartResult:
    """The draft as it is, with a note."""
    return StartResult(draft, notes=("example: nothing was changed",))


STARTS.register("example")(Start(frozenset(), "the stale draft, as none leaves it", same))
