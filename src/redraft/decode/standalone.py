"""Lossless decoding at batch 1 with a chain from a standalone draft, a language model with keys and values of its own.

Verification, sampling and records are those of every chain (:mod:`redraft.decode.engine`). What differs is the draft:
it is fed tokens and nothing else, so the keys of its guesses that verification accepts are right as they are and are
kept. Rolling back therefore takes two steps: the target's cache as ever, and the draft's to the accepted guesses.

Shape legend: T new tokens, G proposed tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redraft.decode.engine import ChainDecoder, _Uniforms
from redraft.drafts.standalone import StandaloneDraft
from redraft.loading import check_tokenizers
from redraft.settings.sampler import Sampler
from redraft.target import KeyValueCache, Target


class DraftKeys(KeyValueCache):
    """The draft's keys and values; from ``verified`` on they belong to guesses of the round before."""

    verified = 0

    def restart(self, verified: int) -> None:
        """Hold the first ``verified`` tokens and nothing else."""
        self.rollback(verified)
        self.verified = verified


class StandaloneDecoder(ChainDecoder):
    """Speculative decoding with ``gamma`` tokens a round from a small language model."""

    def __init__(
        self,
        target: Target,
        draft: StandaloneDraft,
        gamma: int = 5,
        sampler: Sampler | None = None,
        measure_overlap: bool = False,
        greedy_drafts: bool = False,
    ) -> None:
        """Arguments as of :class:`ChainDecoder`. Raises ``UserError`` when draft and target differ in tokenizer."""
        check_tokenizers(draft.tokenizer, target.tokenizer)
        super().__init__(target, draft, gamma, sampler, measure_overlap, greedy_drafts)

    def known(self, ids_T: Tensor) -> Tensor:
        return ids_T

    def new_caches(self, tokens: int) -> tuple[Any, DraftKeys]:
        return self.target.new_cache(tokens + self.proposals), DraftKeys(self.draft.layers, tokens + self.guesses)

    def propose(
        self, ids_T: Tensor, taps_T: Tensor, cache: DraftKeys, gamma: int, uniforms: _Uniforms
    ) -> tuple[list[int], Tensor | None]:
        """Feed what verification kept and the cache does not hold yet, then draft ``gamma`` tokens."""
        # Of what was kept all but the last token are guesses that were accepted; the last guess was never fed.
        held = min(cache.length - cache.verified, len(ids_T) - 1)
        cache.rollback(cache.verified + held)
        cache.verified += len(ids_T)
        feed, tokens, probs = ids_T[held:], list[Tensor](), list[Tensor]()
        for _ in range(gamma):
            logits_1V = self.draft.logits(self.draft.states(feed[None], cache)[0, -1:])
            feed = self.pick(logits_1V, probs, uniforms)
            tokens.append(feed)
        return torch.cat(tokens).tolist(), torch.cat(probs) if probs else None
