"""The proposals of an EAGLE draft: its one layer over buffers of keys and values.

Keys of verified positions come from the target's real features; those that the draft made for its own guesses are
overwritten when it is fed again.

Shape legend: T or F tokens of a pass, H draft width, Q query heads, K key heads, W head width, C cached and new
positions, G proposed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.drafts.proposing import Pick
from redraft.target import Target


class DraftCache:
    """Fixed buffers for the keys and values [K, C, W] of the draft's one layer."""

    def __init__(self, draft: Any, capacity: int) -> None:
        config, like = draft.config, draft.fc.weight
        self.keys = like.new_empty(config.num_key_value_heads, capacity, config.head_dim)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def attend(self, query_TQW: Tensor, key_TKW: Tensor, value_TKW: Tensor, mask_TC: Tensor | None = None) -> Tensor:
        """Append the new keys and let each query see everything up to its own position, or what the mask allows.

        ``mask_TC`` is boolean over cached and new keys, true where a query may look.
        """
        new = len(query_TQW)
        end = self.length + new
        self.keys[:, self.length : end] = key_TKW.transpose(0, 1)
        self.values[:, self.length : end] = value_TKW.transpose(0, 1)
        # Without a mask of its own a prompt goes through the kernels that need none, [T, T] numbers less.
        prompt = mask_TC is None and not self.length
        if mask_TC is None and new > 1 and self.length:
            mask_TC = torch.ones(new, end, dtype=torch.bool, device=query_TQW.device).tril(self.length)
        mixed = F.scaled_dot_product_attention(
            query_TQW.transpose(0, 1)[None],
            self.keys[None, :, :end],
            self.values[None, :, :end],
            attn_mask=mask_TC,
            is_causal=prompt,
            enable_gqa=True,
        )
        self.length = end
        return mixed[0].transpose(0, 1)


class EagleProposer:
    """Chains and trees of one request (:class:`redraft.drafts.proposing.ChainProposer` and ``TreeProposer``).

    ``verified`` counts pairs (h_t, x_{t+1}).
    """

    def __init__(self, draft: Any, target: Target, capacity: int) -> None:
        self.draft, self.embedding, self.capacity = draft, target.embedding, capacity
        self.cache, self.vocabulary, self.verified = DraftCache(draft, capacity), draft.vocabulary(), 0

    def propose(self, ids_T: Tensor, taps_T: Tensor, gamma: int, pick: Pick) -> Tensor:
        """See :meth:`redraft.drafts.proposing.ChainProposer.propose`."""
        states_1H = self.feed(ids_T, taps_T)
        tokens: list[Tensor] = []
        for depth in range(1, gamma + 1):
            tokens.append(self.vocabulary[pick(self.draft.logits(states_1H))])
            if depth < gamma:
                states_1H = self.expand(tokens[-1], states_1H, depth)
        return torch.cat(tokens)

    def feed(self, ids_T: Tensor, taps_T: Tensor) -> Tensor:
        """Take in newly verified pairs; the state [1, H] of the last."""
        draft, pairs = self.draft, len(taps_T)
        self.cache.length = self.verified
        positions_T = torch.arange(self.verified, self.verified + pairs, device=ids_T.device)
        embeds_TH = draft.embed(ids_T[len(ids_T) - pairs :], self.embedding)
        states_TH = draft(embeds_TH, draft.fuse(taps_T), positions_T, self.cache.attend)
        self.verified += pairs
        return states_TH[-1:]

    def expand(self, tokens_F: Tensor, states_FH: Tensor, depth: int, mask_FC: Tensor | None = None) -> Tensor:
        """States [F, H] of guesses at this depth; without a mask each sees all that was fed before it."""
        draft = self.draft

        def attend(query_FQW: Tensor, key_FKW: Tensor, value_FKW: Tensor) -> Tensor:
            return self.cache.attend(query_FQW, key_FKW, value_FKW, mask_FC)

        positions_F = torch.full_like(tokens_F, self.verified + depth - 1)
        return draft(draft.embed(tokens_F, self.embedding), draft.carry(states_FH), positions_F, attend)

    def rollback(self, verified: int) -> None:
        self.verified = verified
