"""Features by a pass of the target in this process over responses that came from elsewhere.

Shape legend: B rows, T tokens, K taps, F target width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.features.source import RowFeatures
from redraft.rows import TokenRow, anchors, length_batches
from redraft.target import KeyValueCache, Target

# A shared opening of fewer tokens is not worth a pass of its own.
LEAST_PREFIX = 8


def common_prefix(rows: Sequence[TokenRow]) -> list[int]:
    """The token ids that all prompts begin with (a chat template's opening, a system prompt), short of their last."""
    first = min((list(row.prompt_ids) for row in rows), default=[])
    last = max((list(row.prompt_ids) for row in rows), default=[])
    length = 0
    while length < min(len(first), len(last)) - 1 and first[length] == last[length]:
        length += 1
    return first[:length]


@dataclass
class Prefix:
    """What is computed once for the tokens that all prompts share."""

    ids: list[int]
    cache: KeyValueCache
    taps_PKF: Tensor


class ComputedFeatures:
    """Runs the target over the rows it is asked for: a source for one row at a time, and a producer for a store."""

    def __init__(self, target: Target) -> None:
        """The taps are those that ``target`` has when it is asked."""
        self.target = target

    def get(self, row: TokenRow) -> tuple[Tensor, Tensor]:
        """See :class:`~redraft.features.FeatureSource`."""
        found = next(self._compute([row], None))
        return found.taps, found.hidden

    def row_bytes(self, row: TokenRow) -> int:
        """See :class:`~redraft.features.FeatureProducer`."""
        if not anchors(row):
            return 0
        width = self.target.hidden_size * self.target.dtype.itemsize
        return width * ((len(row.prompt_ids) + anchors(row) - 1) * len(self.target.taps) + anchors(row))

    def batches(
        self, rows: Sequence[TokenRow], have: Collection[str] = (), batch_tokens: int = 2048
    ) -> Iterator[list[RowFeatures]]:
        """Rows of similar length together; what all their prompts begin with is run once."""
        asked = [row for row in rows if anchors(row)]
        if all(row.key in have for row in asked):
            return
        prefix = self._prefix(asked)
        for batch in length_batches(asked, batch_tokens):
            if any(row.key not in have for row in batch):
                yield list(self._compute(batch, prefix))

    def _prefix(self, rows: Sequence[TokenRow]) -> Prefix | None:
        """The shared opening of all prompts, run once. Nothing when it is not worth a pass of its own."""
        ids = common_prefix(rows)
        if len(ids) < LEAST_PREFIX or not self.target.paths.cached:
            return None
        cache = self.target.new_buffers(len(ids))
        taps = self.target.forward(torch.tensor([ids], device=self.target.device), cache).taps_BTKH
        assert taps is not None
        return Prefix(ids, cache, taps[0])

    def _compute(self, batch: Sequence[TokenRow], prefix: Prefix | None) -> Iterator[RowFeatures]:
        shared = len(prefix.ids) if prefix else 0
        lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in batch]
        ids_BT = torch.zeros(len(batch), max(lengths) - shared, dtype=torch.long)
        for i, row in enumerate(batch):
            ids_BT[i, : lengths[i] - shared] = torch.tensor([*row.prompt_ids, *row.response_ids][shared : lengths[i]])
        cache = prefix.cache.spread(len(batch), max(lengths)) if prefix else None
        # Right padding: causal attention never looks at it.
        step = self.target.forward(ids_BT.to(self.target.device), cache)
        assert step.taps_BTKH is not None
        for i, row in enumerate(batch):
            first, end = len(row.prompt_ids) - shared, lengths[i] - shared
            taps_TKF = step.taps_BTKH[i, : end - 1]
            whole = torch.cat([prefix.taps_PKF, taps_TKF]) if prefix else taps_TKF.clone()
            yield RowFeatures(row, whole.cpu(), step.hidden_BTH[i, first:end].cpu().clone())
