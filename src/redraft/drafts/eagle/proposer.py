"""The proposals of an EAGLE draft: its layers over buffers of keys and values.

Keys of verified positions come from the target's real features; those that the draft made for its own guesses are
overwritten when it is fed again.

The greedy chain is also one step of static shapes, for a CUDA graph (:mod:`redraft.graphs`). Tokens that pad that
step's width write keys behind the verified ones, where they are masked until the next real token overwrites them.

Shape legend: T or F tokens of a pass, S width of the static step, H draft width, K*F fused taps, Q query heads, K key
heads, W head width, C cached and new positions, G proposed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.drafts.layers import Attend, attend_causally
from redraft.drafts.proposing import Pick
from redraft.graphs import Recorded
from redraft.target import Target


class DraftCache:
    """Fixed buffers for the keys and values [K, C, W] of every layer, and the positions of the tokens in them."""

    def __init__(self, draft: Any, capacity: int) -> None:
        config, like = draft.config, draft.fc.weight
        shape = (config.num_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.keys, self.values, self.windows = like.new_empty(shape), like.new_empty(shape), config.reach
        self.positions = torch.arange(capacity, device=like.device)
        self.length = 0

    def extend(self, positions_T: Tensor, mask_TC: Tensor | None = None) -> list[Attend]:
        """Room for new tokens behind the others: how each layer appends their keys and attends to all.

        ``mask_TC`` is boolean over cached and new tokens, true where a new one may look; without it they stand in a row
        and look at everything up to themselves. A layer with a window sees the positions inside it alone.
        """
        start, self.length = self.length, self.length + len(positions_T)
        self.positions[start : self.length] = positions_T
        return [partial(self.attend, number, start, self.length, mask_TC) for number in range(len(self.windows))]

    def attend(
        self,
        number: int,
        start: int,
        end: int,
        mask_TC: Tensor | None,
        query_TQW: Tensor,
        key_TKW: Tensor,
        value_TKW: Tensor,
    ) -> Tensor:
        """Mixed values [T, Q, W] of a layer for tokens whose keys go to the places ``start`` to ``end``."""
        keys, values, window = self.keys[number], self.values[number], self.windows[number]
        keys[:, start:end] = key_TKW.transpose(0, 1)
        values[:, start:end] = value_TKW.transpose(0, 1)
        query, first = query_TQW.transpose(0, 1)[None], 0
        if mask_TC is None and not start:
            # A prompt goes through the kernels that need no mask, [T, T] numbers less.
            mixed = attend_causally(query, keys[None, :, :end], values[None, :, :end], window)
            return mixed[0].transpose(0, 1)
        if mask_TC is None:  # in a row: the first of them sees back to here
            first = max(0, start + 1 - window) if window else 0
        if mask_TC is None and (end - start > 1):
            mask_TC = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
        if mask_TC is not None:
            mask_TC = mask_TC[:, first:]
            if window:
                mask_TC = mask_TC & (self.positions[first:end] > self.positions[start:end, None] - window)
        mixed = F.scaled_dot_product_attention(
            query, keys[None, :, first:end], values[None, :, first:end], attn_mask=mask_TC, enable_gqa=True
        )
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
        states_TH = self.through(embeds_TH, draft.fuse(taps_T), positions_T, self.cache.extend(positions_T))
        self.verified += pairs
        return states_TH[-1:]

    def expand(self, tokens_F: Tensor, states_FH: Tensor, depth: int, mask_FC: Tensor | None = None) -> Tensor:
        """States [F, H] of guesses at this depth; without a mask each sees all that was fed before it."""
        draft, positions_F = self.draft, torch.full_like(tokens_F, self.verified + depth - 1)
        attends = self.cache.extend(positions_F, mask_FC)
        return self.through(draft.embed(tokens_F, self.embedding), draft.carry(states_FH), positions_F, attends)

    def through(self, embeds_TH: Tensor, states_TH: Tensor, positions_T: Tensor, attends: list[Attend]) -> Tensor:
        """The draft's states [T, H]. No position is beyond the buffers, so the device is not asked how far they go."""
        return self.draft.through(embeds_TH, states_TH, self.draft.rotary.below(self.capacity, positions_T), attends)

    def rollback(self, verified: int) -> None:
        self.verified = verified


class StaticProposer(EagleProposer):
    """Feeds at most ``gamma`` + 1 pairs and proposes ``gamma`` tokens in one step, the likeliest ones."""

    def __init__(self, draft: Any, target: Target, capacity: int, gamma: int) -> None:
        super().__init__(draft, target, capacity)
        self.gamma = gamma
        self.cache.keys.zero_()
        self.cache.values.zero_()
        # The table of angles must not grow while a graph is recorded, nor move afterwards.
        draft.rotary.grow(capacity, target.device)
        self.chain: Recorded | None = None

    def propose(self, ids_T: Tensor, taps_T: Tensor, gamma: int, pick: Pick) -> Tensor:
        """As of every chain; ``pick`` is not asked, since a recorded step can only take the likeliest token."""
        width = self.gamma + 1
        if len(taps_T) > width:  # a prompt: all pairs but the last go in dynamically
            self.feed(ids_T[:-1], taps_T[:-1])
            ids_T, taps_T = ids_T[-1:], taps_T[-1:]
        pairs = len(taps_T)
        inputs = [
            F.pad(ids_T[len(ids_T) - pairs :], (0, width - pairs)),
            F.pad(taps_T, (0, 0, 0, width - pairs)),
            torch.tensor([self.verified, pairs], device=ids_T.device),
        ]
        if self.chain is None:
            self.chain = Recorded(self._chain_step(), inputs)
        (proposed,) = self.chain(*inputs)
        self.verified += pairs
        return proposed[:gamma]

    def _chain_step(self) -> Callable[..., tuple[Tensor, ...]]:
        """Verified pairs in, gamma proposals out. ``place`` holds the pairs cached before and the new ones."""
        draft, embedding, gamma, cache = self.draft, self.embedding, self.gamma, self.cache
        assert draft.rotary.table is not None
        cosines, sines = draft.rotary.table
        columns = torch.arange(self.capacity, device=cache.keys.device)
        steps = torch.arange(gamma + 1, device=cache.keys.device)

        def feed(embeds_TH: Tensor, states_TH: Tensor, at_T: Tensor) -> Tensor:
            seen_TC = columns <= at_T[:, None]

            def attend(number: int, query_TQD: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> Tensor:
                keys, values, window = cache.keys[number], cache.values[number], cache.windows[number]
                keys.index_copy_(1, at_T, key_TKD.transpose(0, 1))
                values.index_copy_(1, at_T, value_TKD.transpose(0, 1))
                query_1QTD = query_TQD.transpose(0, 1)[None]
                mask_TC = seen_TC & (columns > at_T[:, None] - window) if window else seen_TC
                mixed = F.scaled_dot_product_attention(
                    query_1QTD, keys[None], values[None], attn_mask=mask_TC, enable_gqa=True
                )
                return mixed[0].transpose(0, 1)

            # Looked up by tensor: the module's own call asks how far the table must reach, which stops the device.
            attends = [partial(attend, number) for number in range(len(cache.windows))]
            return draft.through(embeds_TH, states_TH, (cosines[at_T], sines[at_T]), attends)

        def chain(ids_W: Tensor, taps_WF: Tensor, place: Tensor) -> tuple[Tensor, ...]:
            states_WH = feed(draft.embed(ids_W, embedding), draft.fuse(taps_WF), place[:1] + steps)
            states_1H = states_WH.index_select(0, place[1:] - 1)
            verified, tokens = place[:1] + place[1:], list[Tensor]()
            for i in range(gamma):
                tokens.append(self.vocabulary.index_select(0, draft.logits(states_1H).argmax(-1)))
                if i + 1 < gamma:
                    states_1H = feed(draft.embed(tokens[-1], embedding), draft.carry(states_1H), verified + i)
            return (torch.cat(tokens),)

        return chain
