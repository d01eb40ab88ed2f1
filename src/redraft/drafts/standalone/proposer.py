"""The proposals of a standalone draft: a language model with keys and values of its own.

It is fed tokens and nothing else, so the keys of its guesses that verification accepts are right as they are and are
kept.

Shape legend: T new tokens, G proposed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redraft.drafts.proposing import Pick
from redraft.target import KeyValueCache


class StandaloneProposer:
    """Chains of one request (:class:`redraft.drafts.proposing.ChainProposer`). ``verified`` counts tokens."""

    def __init__(self, draft: Any, capacity: int) -> None:
        self.draft, self.capacity, self.verified = draft, capacity, 0
        self.cache = KeyValueCache(draft.layers, capacity)

    def propose(self, ids_T: Tensor, taps_T: Tensor, gamma: int, pick: Pick) -> Tensor:
        """Feed what verification kept and the cache does not hold yet, then draft ``gamma`` tokens."""
        # Of what was kept all but the last token are guesses that were accepted; the last guess was never fed.
        held = min(self.cache.length - self.verified, len(ids_T) - 1)
        self.cache.rollback(self.verified + held)
        self.verified += len(ids_T)
        feed_T, tokens = ids_T[held:], list[Tensor]()
        for _ in range(gamma):
            feed_T = pick(self.draft.logits(self.draft.states(feed_T[None], self.cache)[0, -1:]))
            tokens.append(feed_T)
        return torch.cat(tokens)

    def rollback(self, verified: int) -> None:
        self.cache.rollback(verified)
        self.verified = verified
