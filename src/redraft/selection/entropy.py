"""``entropy``: how undecided the target is about a sample.

A draft guesses well where the target is sure of itself; where it is not, there is more to learn, and less to gain
when the draft has learnt it. Which of the two weighs more is for a measurement to say: ``--order lowest`` turns the
choice around.

Shape legend: T tokens of a row, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redraft.registries import SCORERS
from redraft.rows import TokenRow
from redraft.selection import Scorer, ScoringContext
from redraft.selection.states import batched_states
from redraft.target import Target

# Logits held at once: 64 MB in float32, whatever the vocabulary and however long the row.
CHUNK_LOGITS = 2**24


@SCORERS.register("entropy")
class Entropy(Scorer):
    """Mean entropy in nats of the target's next-token distributions (temperature 1, nothing filtered).

    Of a response, those that its tokens were drawn from; of a prompt alone, those behind each of its tokens, the
    last of which the answer's first token will be drawn from.
    """

    name = "entropy"
    needs = frozenset({"target"})
    passes = 1

    def score(self, rows: Sequence[TokenRow], context: ScoringContext) -> list[float]:
        """One number a row. Raises ``UserError`` when a row does not fit the target."""
        target = context.target
        assert target is not None  # in ``needs``
        scores = [0.0] * len(rows)
        for row, start, (states_TH,) in batched_states(rows, (target,), context):
            # The token at position t was drawn from the distribution behind t - 1.
            behind_TH = states_TH[start - 1 : -1] if start else states_TH
            scores[row] = float(entropies(target, behind_TH).double().mean())
        return scores


@torch.inference_mode()
def entropies(target: Target, states_TH: Tensor) -> Tensor:
    """Entropy [T] in nats of the distribution behind each final-norm state, at most ``CHUNK_LOGITS`` logits at once."""
    parts = states_TH.split(max(1, CHUNK_LOGITS // target.vocab_size))
    return torch.cat([torch.special.entr(target.logits(part).float().softmax(-1)).sum(-1) for part in parts])
