"""What a draft is taught at the tokens of stored responses: the teacher's logits, from three kinds of knowledge.

- ``states``: the target's own final-norm states, through its head: the whole distribution (white box).
- ``tops``: the likeliest tokens with their log-probabilities, as a server gives them: the distribution restricted to
  them and renormalised (black box).
- ``tokens``: the response's token alone, with all the probability (black box; sequence-level distillation, Kim and
  Rush, arXiv 1606.07947, where KL is the token's cross-entropy).

All come as logits over the vocabulary, so that every loss of the registry takes every kind.

Shape legend: M supervised positions of a batch, N those of a portion, K likeliest tokens, H width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from redraft.data.server import Top
from redraft.data.store import Row
from redraft.drafts.standalone.objective import TeacherLogits
from redraft.errors import UserError
from redraft.rows import anchors


class TopTeacher:
    """The likeliest tokens alone, by row key."""

    def __init__(self, tops: Mapping[str, Top], vocab_size: int) -> None:
        self.tops, self.vocab_size = tops, vocab_size

    def of(self, rows: Sequence[Row], device: torch.device) -> TeacherLogits:
        """See :class:`Teacher`. Raises ``UserError`` for a row without log-probabilities or with too few."""
        ids: list[list[int]] = []
        values: list[list[float]] = []
        for row in rows:
            if row.key not in self.tops:
                raise UserError(f"response {row.key} has no log-probabilities; ask the server for them first")
            row_ids, row_values = self.tops[row.key]
            if not len(row_ids) == len(row_values) == anchors(row):
                raise UserError(f"response {row.key} has log-probabilities for {len(row_ids)} of {anchors(row)} tokens")
            ids += row_ids
            values += row_values
        width = max(map(len, ids), default=0)
        # A token named twice stays what it is: the filler repeats the first one.
        ids_MK = torch.tensor([[*row, *row[:1] * (width - len(row))] for row in ids], device=device)
        filled = [[*row, *row[:1] * (width - len(row))] for row in values]
        values_MK = torch.tensor(filled, dtype=torch.float32, device=device)

        def logits(index_N: Tensor) -> Tensor:
            empty_NV = values_MK.new_full((len(index_N), self.vocab_size), -math.inf)
            return empty_NV.scatter_(1, ids_MK[index_N], values_MK[index_N])

        return logits


class TokenTeacher:
    """The response's own token, with certainty."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def of(self, rows: Sequence[Row], device: torch.device) -> TeacherLogits:
        """See :class:`Teacher`."""
        ids_M = torch.tensor([i for row in rows for i in row.response_ids[1:]], device=device)

        def logits(index_N: Tensor) -> Tensor:
            empty_NV = torch.full((len(index_N), self.vocab_size), -math.inf, device=device)
            return empty_NV.scatter_(1, ids_M[index_N][:, None], 0.0)

        return logits
