"""Decoding with static shapes, for CUDA graphs: one recorded graph a step instead of hundreds of kernel launches.

At batch 1 a step of a small or middling model is bound by launches. A graph (:mod:`redraft.graphs`) replays all of them
at once, but only if nothing in the step depends on a Python number that changes: keys stand in buffers of fixed
capacity and are attended to whole, under a mask that is computed from a position tensor; new keys are written by
``index_copy_`` at a position tensor; widths are rounded up to a few recorded ones. Tokens that pad a width write keys
behind the sequence's end, where they are masked until the next real token overwrites them.

On a CPU the same static steps run without graphs, which is how they are tested: equal to the dynamic path, with the
same operations on the same shapes at every length, and never asking the device for a number. Attending to the whole
buffer costs the same at every length, so choose a capacity near the longest sequence.

Shape legend: T tokens of a step, W recorded width, C capacity, H hidden size, F fused taps, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.decode.engine import ChainDecoder
from redraft.drafts.base import Draft
from redraft.drafts.proposing import ChainProposer
from redraft.errors import UserError
from redraft.graphs import Recorded
from redraft.settings.sampler import Sampler
from redraft.target import FixedLayer, KeyValueCache, Target, TargetStep
from redraft.target.facts import length_bound_ropes


# -- the target ------------------------------------------------------------------------------------------------------
class StaticLayer(FixedLayer):
    """A layer's buffers, written at a position tensor while ``at_T`` is set, and like its parent otherwise."""

    at_T: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        # A masked column still enters a product, and a stray NaN would survive its weight of zero.
        self.keys.zero_()
        self.values.zero_()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.at_T is None:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.at_T, key_states)
        self.values.index_copy_(2, self.at_T, value_states)
        return self.keys, self.values


class StaticCache(KeyValueCache):
    """A cache for static steps; ``length`` and roll-back stay ordinary numbers outside of them."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers, capacity)
        self.layers = [StaticLayer(capacity) for _ in range(layers)]

    def key_positions(self, positions_BT: Tensor) -> Tensor:
        """As of every cache; columns behind the new ones count as their own number, which nobody looks at."""
        columns_C = torch.arange(self.capacity, device=positions_BT.device)
        at_T = self.layers[0].at_T
        if at_T is None:
            return super().key_positions(positions_BT)
        return columns_C.index_copy(0, at_T, positions_BT[0])[None]

    def place(self, at_T: Tensor | None) -> None:
        """Write the next keys at these columns; ``None`` goes back to appending."""
        for layer in self.layers:
            layer.at_T = at_T


class StaticTarget(Target):
    """A target whose short steps have static shapes and, on CUDA, are replayed from graphs.

    Decoders take it in place of the target it wraps; weights are shared. Graphs remember the addresses of one cache,
    so there is one: ``new_cache`` empties it and hands it out again, and only one sequence can be decoded at a time.
    Steps wider than the widest recorded width (prompts) run dynamically.
    """

    def __init__(self, target: Target, widths: Sequence[int], capacity: int = 0) -> None:
        """``widths``: numbers of tokens that steps will have, for example 1 and gamma + 1.

        ``capacity``: tokens that the cache should hold from the start; it grows, and graphs are recorded anew, when a
        longer one is asked for. Raises ``UserError`` for a target whose rotary frequencies follow the length: it asks
        the device for that at every step, which no graph can hold.
        """
        for rope in length_bound_ropes(target.config):
            raise UserError(
                f"{target.name} has a {rope['rope_type']} rope, which static steps cannot follow; leave --static out"
            )
        target.require("masked")
        super().__init__(target.model, target.tokenizer, target.name, target.taps)
        self.widths = tuple(sorted(set(widths)))
        self.smallest = capacity
        self.static_cache: StaticCache | None = None
        self.steps: dict[tuple[int, bool], Recorded] = {}

    def tap(self, taps: Sequence[int]) -> None:
        super().tap(taps)
        self.steps = {}

    def new_cache(self, capacity: int) -> StaticCache:
        """The one cache, emptied; whoever had it before loses it."""
        needed = max(capacity, self.smallest) + self.widths[-1]
        if self.static_cache is None or self.static_cache.capacity < needed:
            self.static_cache = StaticCache(self.layers, needed)
            self.steps = {}
        self.static_cache.rollback(0)
        return self.static_cache

    @torch.inference_mode()
    def forward(
        self,
        ids_BT: Tensor,
        cache: KeyValueCache | None = None,
        positions_BT: Tensor | None = None,
        mask_B1TC: Tensor | None = None,
        taps: bool = True,
    ) -> TargetStep:
        """As :meth:`redraft.target.Target.forward`; static when ``cache`` is this target's and the step is short."""
        tokens = ids_BT.shape[1]
        ours = cache if isinstance(cache, StaticCache) and cache is self.static_cache else None
        # The first pass allocates the buffers, which no recording may do; a mask is a tree's, which has no fixed shape.
        if ours is None or not ours.length or tokens > self.widths[-1] or mask_B1TC is not None:
            return super().forward(ids_BT, cache, positions_BT, mask_B1TC, taps)
        width = next(w for w in self.widths if w >= tokens)
        start = ours.length
        if start + width > ours.capacity:
            raise ValueError(f"cache of {ours.capacity} tokens cannot hold {start + width}, padding included")
        inputs = [F.pad(ids_BT, (0, width - tokens)), torch.arange(start, start + width, device=ids_BT.device)]
        if (width, taps) not in self.steps:
            self.steps[width, taps] = Recorded(self._step(ours, taps), inputs)
        hidden, *fused = self.steps[width, taps](*inputs)
        for layer in ours.layers:
            layer.length += tokens
        return TargetStep(hidden[:, :tokens], fused[0][:, :tokens] if fused else None)

    def _step(self, cache: StaticCache, taps: bool) -> Callable[..., tuple[Tensor, ...]]:
        forward = super().forward

        def step(ids_1W: Tensor, at_W: Tensor) -> tuple[Tensor, ...]:
            mask_11WC = (torch.arange(cache.capacity, device=at_W.device) <= at_W[:, None])[None, None]
            cache.place(at_W)
            try:
                found = forward(ids_1W, cache, at_W[None], mask_11WC, taps)
            finally:
                cache.place(None)
            return (found.hidden_BTH,) if found.taps_BTKH is None else (found.hidden_BTH, found.taps_BTKH)

        return step


# -- the draft -------------------------------------------------------------------------------------------------------
class StaticChainDecoder(ChainDecoder):
    """A chain decoder whose rounds have static shapes: one step for the whole draft chain, one for verification.

    Sampled drafts go through the dynamic draft: their warping looks at the probabilities to decide how much to sort.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft,
        gamma: int = 5,
        sampler: Sampler | None = None,
        greedy_drafts: bool = False,
        capacity: int = 0,
    ) -> None:
        """``capacity``: tokens of the longest prompt and response together, for which buffers are made at once.

        Raises ``UserError`` when the draft does not fit the target.
        """
        super().__init__(target, draft, gamma, sampler, greedy_drafts=greedy_drafts)
        self.target = StaticTarget(target, (1, gamma + 1), capacity + gamma + 1)
        self.smallest = capacity
        self.kept: ChainProposer | None = None

    def new_proposer(self, tokens: int) -> ChainProposer:
        """The one proposer that graphs know, emptied; a larger one when the text is longer than ever."""
        if not self.fixed:
            return super().new_proposer(tokens)
        # A round feeds at most gamma + 1 pairs, padded, and then gamma - 1 guesses behind the real ones.
        needed = max(tokens, self.smallest) + 2 * self.gamma
        if self.kept is None or self.kept.capacity < needed:
            self.kept = self.draft.static_proposer(self.target, needed, self.gamma)
        self.kept.rollback(0)
        return self.kept
