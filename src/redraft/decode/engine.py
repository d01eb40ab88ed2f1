"""Lossless decoding at batch 1: plain, and with an Eagle3 draft's chain (trees: :mod:`redraft.decode.tree_engine`).

A round: the draft proposes tokens, the target verifies them in one pass, the verification rule of
:mod:`redraft.decode.accept` decides, both caches are rolled back to what was kept. All buffers are allocated once
for the longest sequence. The draft's keys of verified positions come from the target's real features; those that
it made for its own guesses are overwritten in the next round.

Shape legend: T new tokens, H draft width, K key heads, W head width, D draft vocabulary, V target vocabulary,
G proposed tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.decode.accept import accept_chain, accept_greedy
from redraft.drafts.base import Draft
from redraft.drafts.eagle import EagleDraft
from redraft.errors import UserError
from redraft.prepack import prepack
from redraft.sampling import Sampler, draw, warp
from redraft.target import Target


@dataclass
class Round:
    """One proposal and its verification.

    ``proposed`` are all proposed tokens, a tree's level by level; ``kept`` the ``accepted`` ones and one more, cut by
    the stop rule. ``overlap`` is sum_x min(target, draft) at each drafted position of a chain. ``depth`` is how many
    tokens could have been accepted (a tree's longest path), ``full`` whether the accepted path ended in a leaf, which
    makes the token after it a bonus and no correction.
    """

    proposed: list[int]
    accepted: int
    kept: list[int]
    draft_seconds: float
    verify_seconds: float
    overlap: list[float] = field(default_factory=list)
    depth: int = 0
    full: bool = False

    def __post_init__(self) -> None:
        if not self.depth:
            self.depth = len(self.proposed)
        self.full = self.full or self.accepted == self.depth


@dataclass
class Generation:
    """Response ids (the end token included), how it ended, what it took, and the rounds where there were any."""

    ids: list[int]
    finish_reason: str
    prefill_seconds: float
    decode_seconds: float
    rounds: list[Round] = field(default_factory=list)


class DraftCache:
    """Fixed buffers for the keys and values [C, K, W] of the draft's one layer."""

    def __init__(self, draft: EagleDraft, capacity: int) -> None:
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


class _Uniforms:
    """The uniforms in [0, 1) of one request: one stream, whatever the portions in which it is taken."""

    BLOCK = 256

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.block, self.at = self.fresh(self.BLOCK), 0

    def fresh(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64).to(self.device)

    def take(self, count: int) -> Tensor:
        if self.at + count > len(self.block):
            blocks = -(-count // self.BLOCK)
            more = [self.fresh(self.BLOCK) for _ in range(blocks)]
            self.block, self.at = torch.cat([self.block[self.at :], *more]), 0
        self.at += count
        return self.block[self.at - count : self.at]

    def put_back(self, count: int) -> None:
        """Return the last ``count`` uniforms of the portion just taken: nothing was decided with them."""
        self.at -= count


def _trim(ids: list[int], ends: frozenset[int], room: int) -> tuple[list[int], str | None]:
    """The tokens up to an end token or the limit, and the reason if one of them struck."""
    for i, token in enumerate(ids[:room]):
        if token in ends:
            return ids[: i + 1], "stop"
    return (ids[:room], "length") if len(ids) >= room else (ids, None)


class PlainDecoder:
    """Cached decoding by the target alone: the baseline of every speed-up."""

    def __init__(self, target: Target, sampler: Sampler | None = None) -> None:
        self.target, self.sampler = target, sampler or Sampler()
        self.ends = frozenset(target.eos_ids)

    def choose(self, logits_V: Tensor, uniforms: _Uniforms) -> int:
        if self.sampler.greedy:
            return int(logits_V.argmax())
        return int(draw(warp(logits_V[None], self.sampler), uniforms.take(1)))

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, seed: int = 0) -> Generation:
        """Decode one prompt. Raises ``ValueError`` when prompt and response do not fit the context."""
        _check_room(self.target, prompt_ids, max_new_tokens)
        began = time.perf_counter()
        target, uniforms = self.target, _Uniforms(seed, self.target.device)
        cache = target.new_cache(len(prompt_ids) + max_new_tokens)
        step = target.forward(torch.tensor([list(prompt_ids)], device=target.device), cache, taps=False)
        ids = [self.choose(target.logits(step.hidden_BTH[0, -1]), uniforms)]
        prefilled = time.perf_counter()
        reason = _trim(ids, self.ends, max_new_tokens)[1]
        while reason is None:
            step = target.forward(torch.tensor([[ids[-1]]], device=target.device), cache, taps=False)
            ids.append(self.choose(target.logits(step.hidden_BTH[0, -1]), uniforms))
            reason = "stop" if ids[-1] in self.ends else "length" if len(ids) == max_new_tokens else None
        return Generation(ids, reason, prefilled - began, time.perf_counter() - prefilled)


def for_decoding(draft: Any, target: Target) -> Any:
    """The draft where the target is, in its type, bound to it and packed; ``draft`` itself stays in the type it has.

    Whoever trains or saves it afterwards must find what was handed in.
    """
    if any((p.dtype, p.device) != (target.dtype, target.device) for p in draft.parameters()):
        draft = copy.deepcopy(draft)
    return prepack(draft.eval().to(target.device, target.dtype).bind(target))


class SpeculativeDecoder(PlainDecoder):
    """The loop that chains and trees share. A subclass says what a round is (:meth:`round`).

    Greedy output equals plain decoding's token for token wherever the target's own arithmetic does not depend on
    how many tokens it is given at once; sampled output follows the same distribution. With greedy drafts the target
    uses its uniforms as plain decoding does, so even sampled output is the same for the same seed.
    """

    # The most tokens that a round proposes, and the most that the draft feeds to itself in a round.
    proposals: int
    guesses: int
    # Which family, and with it what the draft's cache is, a subclass knows.
    draft: Any

    def __init__(
        self, target: Target, draft: Draft, sampler: Sampler | None = None, greedy_drafts: bool = False
    ) -> None:
        """``greedy_drafts``: the draft proposes its likeliest tokens also when the target samples.

        Raises ``UserError`` when the draft does not fit the target.
        """
        super().__init__(target, sampler)
        draft.check_fit(target)
        self.draft = for_decoding(draft, target)
        self.fixed = greedy_drafts or self.sampler.greedy
        self.vocabulary = self.draft.vocabulary()

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        seed: int = 0,
        on_round: Callable[[Round], None] | None = None,
    ) -> Generation:
        """Decode one prompt; ``on_round`` gets the token of prefill as a round of its own, then every round.

        Raises ``ValueError`` when prompt and response do not fit the context.
        """
        _check_room(self.target, prompt_ids, max_new_tokens)
        began = time.perf_counter()
        target, uniforms = self.target, _Uniforms(seed, self.target.device)
        if target.taps != self.draft.config.taps:
            target.tap(self.draft.config.taps)
        cache, draft_cache = self.new_caches(len(prompt_ids) + max_new_tokens + 1)
        prompt = torch.tensor(list(prompt_ids), device=target.device)
        step = target.forward(prompt[None], cache)
        assert step.taps_BTKH is not None
        ids = [self.choose(target.logits(step.hidden_BTH[0, -1]), uniforms)]
        known_ids, known_taps = self.known(torch.cat([prompt, prompt.new_tensor(ids)])), step.taps_BTKH[0]
        prefilled = time.perf_counter()
        generation = Generation(ids, "length", prefilled - began, 0.0)
        reason = _trim(ids, self.ends, max_new_tokens)[1]
        if on_round:
            on_round(Round([], 0, list(ids), 0.0, 0.0))
        while reason is None:
            room = max_new_tokens - len(ids)
            record, known_ids, known_taps = self.round(
                ids[-1], known_ids, known_taps, draft_cache, cache, room, uniforms
            )
            record.kept, reason = _trim(record.kept, self.ends, room)
            ids.extend(record.kept)
            generation.rounds.append(record)
            if on_round:
                on_round(record)
        generation.finish_reason = reason
        generation.decode_seconds = time.perf_counter() - prefilled
        return generation

    def known(self, ids_T: Tensor) -> Tensor:
        """Of prompt and first token those that the draft is fed: the tokens of the pairs (h_t, x_{t+1})."""
        return ids_T[1:]

    def new_caches(self, tokens: int) -> tuple[Any, Any]:
        """Buffers for the longest sequence and one round beyond it."""
        return self.target.new_cache(tokens + self.proposals), DraftCache(self.draft, tokens + self.guesses)

    def round(
        self,
        last: int,
        ids_T: Tensor,
        taps_T: Tensor,
        draft_cache: Any,
        cache: Any,
        room: int,
        uniforms: _Uniforms,
    ) -> tuple[Round, Tensor, Tensor]:
        """Draft after ``last`` from the newly verified pairs, verify; no deeper than ``room`` tokens.

        Returns the round, and the ids and taps of the pairs that it verified.
        """
        raise NotImplementedError


class ChainDecoder(SpeculativeDecoder):
    """Speculative decoding with a chain of ``gamma`` drafted tokens a round."""

    def __init__(
        self,
        target: Target,
        draft: Draft,
        gamma: int = 5,
        sampler: Sampler | None = None,
        measure_overlap: bool = False,
        greedy_drafts: bool = False,
    ) -> None:
        """``measure_overlap`` records alpha's terms at every drafted position; it costs a softmax a position.

        Raises ``UserError`` when the draft does not fit the target.
        """
        super().__init__(target, draft, sampler, greedy_drafts)
        if gamma < 1:
            raise UserError(f"gamma must be at least 1, not {gamma}")
        self.gamma, self.measure_overlap = gamma, measure_overlap
        self.proposals = self.guesses = gamma

    def round(
        self,
        last: int,
        ids_T: Tensor,
        taps_T: Tensor,
        draft_cache: Any,
        cache: Any,
        room: int,
        uniforms: _Uniforms,
    ) -> tuple[Round, Tensor, Tensor]:
        start = time.perf_counter()
        proposed, draft_probs = self.propose(ids_T, taps_T, draft_cache, min(self.gamma, room), uniforms)
        drafted = time.perf_counter()
        record, ids_T, taps_T = self.verify(last, proposed, draft_probs, cache, uniforms)
        record.draft_seconds = drafted - start
        record.verify_seconds = time.perf_counter() - drafted
        return record, ids_T, taps_T

    def propose(
        self, ids_T: Tensor, taps_T: Tensor, cache: Any, gamma: int, uniforms: _Uniforms
    ) -> tuple[list[int], Tensor | None]:
        """Feed the newly verified pairs, then draft ``gamma`` tokens; also their warped probabilities [G, D]."""
        draft, embedding = self.draft, self.target.embedding
        verified = cache.length + len(ids_T)
        positions = torch.arange(cache.length, verified, device=ids_T.device)
        states = draft(draft.embed(ids_T, embedding), draft.fuse(taps_T), positions, cache.attend)[-1:]
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for i in range(gamma):
            index = self.pick(draft.logits(states), probs, uniforms)
            tokens.append(self.vocabulary[index])
            if i + 1 < gamma:
                position = positions[-1:] + i + 1
                states = draft(draft.embed(tokens[-1], embedding), draft.carry(states), position, cache.attend)
        cache.length = verified
        return torch.cat(tokens).tolist(), torch.cat(probs) if probs else None

    def pick(self, logits_1D: Tensor, probs: list[Tensor], uniforms: _Uniforms) -> Tensor:
        """The index [1] that the draft proposes; its probabilities are put to ``probs`` where they are wanted."""
        if not self.fixed:
            probs.append(warp(logits_1D, self.sampler))
            return draw(probs[-1], uniforms.take(1))
        if self.measure_overlap:
            # A greedy target's alpha is that of the distributions; a sampling one's that of the point mass.
            probs.append(logits_1D.float().softmax(-1) if self.sampler.greedy else warp(logits_1D, Sampler()))
        return logits_1D.argmax(-1)

    def verify(
        self, last: int, proposed: list[int], draft_probs: Tensor | None, cache: Any, uniforms: _Uniforms
    ) -> tuple[Round, Tensor, Tensor]:
        """One target pass over the last token and the proposals; keeps what the rule accepts.

        Returns the round, and the ids and taps of the newly verified pairs.
        """
        target = self.target
        ids_T = torch.tensor([last, *proposed], device=target.device)
        before = cache.length
        step = target.forward(ids_T[None], cache)
        assert step.taps_BTKH is not None
        logits_TV = target.logits(step.hidden_BTH[0])
        overlap: list[float] = []
        if self.sampler.greedy:
            accepted, following = accept_greedy(logits_TV.argmax(-1), proposed)
            target_probs = logits_TV.float().softmax(-1) if self.measure_overlap else None
        else:
            target_probs = warp(logits_TV, self.sampler)
            chances = uniforms.take(len(proposed) + 1)
            if self.fixed:
                accepted, following = accept_greedy(draw(target_probs, chances), proposed)
                uniforms.put_back(len(proposed) - accepted)
            else:
                assert draft_probs is not None
                full = target_probs.new_zeros(len(proposed), target_probs.shape[-1])
                full[:, self.vocabulary] = draft_probs
                accepted, following = accept_chain(target_probs, full, ids_T[1:], chances)
        if self.measure_overlap and draft_probs is not None and target_probs is not None:
            overlap = self.overlap(target_probs[:-1], draft_probs)
        kept = [*proposed[:accepted], following]
        cache.rollback(before + accepted + 1)
        record = Round(proposed, accepted, kept, 0.0, 0.0, overlap)
        return record, torch.tensor(kept, device=target.device), step.taps_BTKH[0, : accepted + 1]

    def overlap(self, target_probs_GV: Tensor, draft_probs_GD: Tensor) -> list[float]:
        """sum_x min(target, draft) at each drafted position; outside the draft vocabulary the draft has none."""
        return torch.minimum(target_probs_GV[:, self.vocabulary], draft_probs_GD).sum(-1).tolist()


def _check_room(target: Target, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    if not prompt_ids or max_new_tokens < 1 or len(prompt_ids) + max_new_tokens > target.context:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} and a response of {max_new_tokens} tokens do not fit "
            f"a context of {target.context}"
        )
