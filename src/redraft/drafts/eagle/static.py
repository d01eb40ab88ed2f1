"""The greedy chain of an EAGLE draft as one step of static shapes, for a CUDA graph (:mod:`redraft.graphs`).

Tokens that pad a step's width write keys behind the verified ones, where they are masked until the next real token
overwrites them.

Shape legend: T tokens, W width of the step, F fused taps, H draft width, Q query heads, K key heads, D head width,
C capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.drafts.eagle.proposer import EagleProposer
from redraft.drafts.proposing import Pick
from redraft.graphs import Recorded
from redraft.target import Target


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
            def attend(query_TQD: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> Tensor:
                cache.keys.index_copy_(1, at_T, key_TKD.transpose(0, 1))
                cache.values.index_copy_(1, at_T, value_TKD.transpose(0, 1))
                query_1QTD, mask_TC = query_TQD.transpose(0, 1)[None], columns <= at_T[:, None]
                keys, values = cache.keys[None], cache.values[None]
                mixed = F.scaled_dot_product_attention(query_1QTD, keys, values, attn_mask=mask_TC, enable_gqa=True)
                return mixed[0].transpose(0, 1)

            # Looked up by tensor: the module's own call asks how far the table must reach, which stops the device.
            return draft.midlayer(embeds_TH, states_TH, (cosines[at_T], sines[at_T]), attend)

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
