"""Lossless decoding at batch 1: plain, and with a draft's chain (trees: :mod:`redraft.decode.tree`).

A round: the draft proposes tokens, the target verifies them in one pass, the verification rule of
:mod:`redraft.decode.accept` decides, the target's cache is rolled back to what was kept, and the draft is told what
that is. All buffers are allocated once for the longest sequence. How a draft proposes, and what it remembers of a
request, is its family's (:mod:`redraft.drafts.proposing`).

Shape legend: N rows of logits, D draft vocabulary, V target vocabulary, G proposed tokens, T verified positions.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from redraft import metrics
from redraft.arithmetic import prepack
from redraft.decode.accept import accept_chains, accept_greedy
from redraft.decode.requests import Generation, Request, Round, Uniforms, check_room, trim
from redraft.drafts.base import AnyDraft, Draft
from redraft.sampling import draw, warp
from redraft.settings.sampler import Sampler
from redraft.target import Target

OnRound = Callable[[Round], None]


class PlainDecoder:
    """Cached decoding by the target alone: the baseline of every speed-up."""

    def __init__(self, target: Target, sampler: Sampler | None = None) -> None:
        self.target, self.sampler = target, sampler or Sampler()
        self.ends = frozenset(target.eos_ids)

    def choose(self, logits_V: Tensor, uniforms: Uniforms) -> int:
        if self.sampler.greedy:
            return int(logits_V.argmax())
        return int(draw(warp(logits_V[None], self.sampler), uniforms.take(1)))

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, seed: int = 0) -> Generation:
        """Decode one prompt. Raises ``ValueError`` when prompt and response do not fit the context."""
        check_room(self.target, prompt_ids, max_new_tokens)
        began = time.perf_counter()
        target, uniforms = self.target, Uniforms(seed, self.target.device)
        cache = target.new_cache(len(prompt_ids) + max_new_tokens)
        step = target.forward(torch.tensor([list(prompt_ids)], device=target.device), cache, taps=False)
        ids = [self.choose(target.logits(step.hidden_BTH[0, -1]), uniforms)]
        prefilled = time.perf_counter()
        reason = trim(ids, self.ends, max_new_tokens)[1]
        while reason is None:
            step = target.forward(torch.tensor([[ids[-1]]], device=target.device), cache, taps=False)
            ids.append(self.choose(target.logits(step.hidden_BTH[0, -1]), uniforms))
            reason = "stop" if ids[-1] in self.ends else "length" if len(ids) == max_new_tokens else None
        return Generation(ids, reason, prefilled - began, time.perf_counter() - prefilled)


def for_decoding(draft: AnyDraft, target: Target) -> AnyDraft:
    """The draft where the target is, in its type, bound to it and packed. ``draft`` itself stays in the type it has:
    whoever trains or saves it afterwards must find what was handed in."""
    if any((p.dtype, p.device) != (target.dtype, target.device) for p in draft.parameters()):
        draft = copy.deepcopy(draft)
    return prepack(draft.eval().to(target.device, target.dtype).bind(target))


class SpeculativeDecoder(PlainDecoder):
    """The loop that chains and trees share. A subclass says how to :meth:`propose` and how to :meth:`verify`.

    Greedy output equals plain decoding's token for token wherever the target's own arithmetic does not depend on
    how many tokens it is given at once; sampled output follows the same distribution. With greedy drafts the target
    uses its uniforms as plain decoding does, so even sampled output is the same for the same seed.
    """

    # The most tokens that a round proposes, and the most that the draft feeds to itself in a round.
    proposals: int
    guesses: int

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
        self, prompt_ids: Sequence[int], max_new_tokens: int, seed: int = 0, on_round: OnRound | None = None
    ) -> Generation:
        """Decode one prompt; ``on_round`` gets the token of prefill as a round of its own, then every round.

        Raises ``ValueError`` when prompt and response do not fit the context.
        """
        check_room(self.target, prompt_ids, max_new_tokens)
        began = time.perf_counter()
        request = self.prefill(prompt_ids, max_new_tokens, seed)
        prefilled = time.perf_counter()
        generation = Generation(request.ids, "length", prefilled - began, 0.0)
        reason = trim(request.ids, self.ends, max_new_tokens)[1]
        if on_round:
            on_round(Round([], 0, list(request.ids)))
        while reason is None:
            record = self.round(request)
            record.kept, reason = trim(record.kept, self.ends, request.room)
            request.ids.extend(record.kept)
            generation.rounds.append(record)
            if on_round:
                on_round(record)
        generation.finish_reason = reason
        generation.decode_seconds = time.perf_counter() - prefilled
        return generation

    def prefill(self, prompt_ids: Sequence[int], max_new_tokens: int, seed: int = 0) -> Request:
        """The request once the target has read the prompt and chosen the first token."""
        target, uniforms = self.target, Uniforms(seed, self.target.device)
        if target.taps != self.draft.taps:
            target.tap(self.draft.taps)
        tokens = len(prompt_ids) + max_new_tokens + 1  # the longest sequence, and one round beyond it
        cache, proposer = target.new_cache(tokens + self.proposals), self.new_proposer(tokens)
        prompt = torch.tensor(list(prompt_ids), device=target.device)
        step = target.forward(prompt[None], cache)
        assert step.taps_BTKH is not None
        first = self.choose(target.logits(step.hidden_BTH[0, -1]), uniforms)
        ids_T = torch.cat([prompt, prompt.new_tensor([first])])
        return Request(prompt_ids, max_new_tokens, uniforms, cache, proposer, [first], ids_T, step.taps_BTKH[0])

    def new_proposer(self, tokens: int) -> Any:
        """The draft's state of a request of so many tokens."""
        return self.draft.proposer(self.target, tokens + self.guesses)

    def round(self, request: Request) -> Round:
        """Draft after the last token, verify; no deeper than the request has room for."""
        start = time.perf_counter()
        proposal = self.propose(request)
        drafted = time.perf_counter()
        record = self.verify(request, proposal)
        record.draft_seconds = drafted - start
        record.verify_seconds = time.perf_counter() - drafted
        return record

    def propose(self, request: Request) -> Any:
        """What the draft proposes, of the subclass's own kind; it is told what was verified."""
        raise NotImplementedError

    def verify(self, request: Request, proposal: Any) -> Round:
        """One target pass over the last token and the proposals; keeps what the rule accepts, in the target's cache
        and as the request's newly verified tokens."""
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
        self.gamma, self.measure_overlap = gamma, measure_overlap
        self.proposals = self.guesses = gamma

    def propose(self, request: Request) -> tuple[list[int], Tensor | None]:
        """The proposed ids, and their warped probabilities [G, D] where they are wanted."""
        rows: list[Tensor] = []

        def pick(logits_ND: Tensor) -> Tensor:
            if not self.fixed:
                rows.append(warp(logits_ND, self.sampler))
                return draw(rows[-1], request.uniforms.take(len(logits_ND)))
            if self.measure_overlap:
                # A greedy target's alpha is that of the distributions; a sampling one's that of the point mass.
                rows.append(logits_ND.float().softmax(-1) if self.sampler.greedy else warp(logits_ND, Sampler()))
            return logits_ND.argmax(-1)

        gamma = min(self.gamma, request.room)
        proposed_G = request.proposer.propose(request.new_ids_T, request.new_taps_T, gamma, pick)
        return proposed_G.tolist(), torch.cat(rows) if rows else None

    def verify(self, request: Request, proposal: tuple[list[int], Tensor | None]) -> Round:
        target, cache, uniforms = self.target, request.cache, request.uniforms
        proposed, draft_probs = proposal
        ids_T = torch.tensor([request.ids[-1], *proposed], device=target.device)
        before = cache.length
        step = target.forward(ids_T[None], cache)
        assert step.taps_BTKH is not None
        logits_TV, overlap = target.logits(step.hidden_BTH[0]), list[float]()
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
                found = accept_chains(target_probs[None], full[None], ids_T[None, 1:], chances[None])
                accepted, following = int(found[0]), int(found[1])
        if self.measure_overlap and draft_probs is not None and target_probs is not None:
            # Outside the draft vocabulary the draft has none.
            overlap = metrics.overlap(target_probs[:-1, self.vocabulary], draft_probs).tolist()
        kept = [*proposed[:accepted], following]
        cache.rollback(before + accepted + 1)
        request.new_ids_T = torch.tensor(kept, device=target.device)
        request.new_taps_T = step.taps_BTKH[0, : accepted + 1]
        return Round(proposed, accepted, kept, overlap=overlap)
