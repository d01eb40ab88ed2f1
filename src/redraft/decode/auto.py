"""The decoder of a shape, and the shape ``auto``: the one that decodes fastest here, by measured costs and acceptance.

A shape's speed-up is tau * plain / round: tokens a round, times the seconds of a plain decoding step, over the
seconds of a round. Costs are timed on the decoders' own rounds, so that everything a round does is in them. tau of
greedy chains of every length follows from one teacher-forced pass (the run length at each position, walked with
each chain's cap, gives the very rounds of decoding); other shapes decode a few prompts.

A draft that does not pay off is an outcome like any other: then the choice is no draft at all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from redraft.acceptance.simulate import walk
from redraft.decode.engine import ChainDecoder, PlainDecoder, SpeculativeDecoder
from redraft.decode.requests import Uniforms
from redraft.decode.static import StaticChainDecoder, StaticTarget
from redraft.decode.tree import TreeDecoder
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, DynamicTree, Shape
from redraft.target import Target

# Chains whose rounds are timed; costs of the lengths between them are interpolated.
TIMED_CHAINS = (1, 2, 4, 8)
# The trees that are tried unless others are named: a small and a full dynamic one (EAGLE-2's, arXiv 2406.16858).
TREES = (DynamicTree(depth=4, top_k=4, nodes=12), DynamicTree(depth=5, top_k=10, nodes=60))


@dataclass(frozen=True)
class RoundCost:
    """Seconds of one round: what the draft does, and what the target and the verification rule do."""

    draft: float
    verify: float

    @property
    def seconds(self) -> float:
        return self.draft + self.verify


@dataclass(frozen=True)
class Costs:
    """Measured in one prompt's context: seconds of a plain step, and of a round by shape."""

    plain: float
    rounds: Mapping[Shape, RoundCost]

    def of(self, shape: Shape) -> RoundCost:
        """The cost of a shape's round; of a chain that was not timed, on the straight line between those that were."""
        if shape in self.rounds:
            return self.rounds[shape]
        timed = sorted((s.gamma, c.draft, c.verify) for s, c in self.rounds.items() if isinstance(s, ChainShape))
        gammas, draft, verify = zip(*timed, strict=True)
        return RoundCost(float(np.interp(shape.depth, gammas, draft)), float(np.interp(shape.depth, gammas, verify)))


@dataclass(frozen=True)
class Candidate:
    """A shape with its tokens a round, its seconds a round and what these promise against plain decoding."""

    shape: Shape
    tau: float
    round_seconds: float
    speedup: float

    def __str__(self) -> str:
        return f"{self.shape.describe()}: predicted {self.speedup:.2f}x"


@dataclass(frozen=True)
class Pick:
    """The chosen shape (``None``: plain decoding is faster), all candidates from best to worst, and a sentence."""

    shape: Shape | None
    candidates: list[Candidate]
    sentence: str


def make_decoder(
    target: Target,
    draft: Draft,
    shape: Shape,
    sampler: Sampler | None = None,
    greedy_drafts: bool = False,
    measure_overlap: bool = False,
) -> SpeculativeDecoder:
    """The decoder of a shape: a chain's or a tree's, with static shapes where the target has them.

    Raises ``UserError`` when the draft does not fit the target, for a dynamic tree of sampled drafts, for a tree of
    a family that grows none, and for ``measure_overlap`` on a tree: alpha is defined on a chain.
    """
    if isinstance(shape, ChainShape) and isinstance(target, StaticTarget) and not measure_overlap:
        return StaticChainDecoder(target, draft, shape.gamma, sampler, greedy_drafts, target.smallest)
    if isinstance(shape, ChainShape):
        return ChainDecoder(target, draft, shape.gamma, sampler, measure_overlap, greedy_drafts)
    if measure_overlap:
        raise UserError(f"alpha is measured along a chain, not on a {shape.describe()}; measure it with chain:5")
    return TreeDecoder(target, draft, shape, sampler, greedy_drafts)


# -- costs -----------------------------------------------------------------------------------------------------------
def measure_costs(
    target: Target,
    draft: Draft,
    prompt_ids: Sequence[int],
    gammas: Sequence[int] = TIMED_CHAINS,
    shapes: Sequence[Shape] = (),
    sampler: Sampler | None = None,
    greedy_drafts: bool = False,
    repeats: int = 7,
) -> Costs:
    """Time one plain step and one round of every shape after ``prompt_ids``: medians of ``repeats``.

    Every repeat times every shape once before the next begins, so that a machine that slows down slows all alike.
    Raises ``UserError`` when the draft does not fit the target or a shape does not go with the sampler.
    """
    every = [*(ChainShape(gamma) for gamma in sorted(set(gammas))), *shapes]
    plain = _plain_step(PlainDecoder(target, sampler), prompt_ids)
    rounds = [_round(make_decoder(target, draft, shape, sampler, greedy_drafts), prompt_ids) for shape in every]
    # The first pass warms up.
    found = [(plain(), [one() for one in rounds]) for _ in range(repeats + 1)][1:]
    costs = [
        RoundCost(statistics.median(c.draft for c in kept), statistics.median(c.verify for c in kept))
        for kept in zip(*(costs for _, costs in found), strict=True)
    ]
    return Costs(statistics.median(seconds for seconds, _ in found), dict(zip(every, costs, strict=True)))


def _synchronise(target: Target) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)


@torch.inference_mode()
def _plain_step(decoder: PlainDecoder, prompt_ids: Sequence[int]) -> Callable[[], float]:
    """A function that runs the same plain step again and again and says how long it took."""
    target = decoder.target
    cache, uniforms = target.new_cache(len(prompt_ids) + 1), Uniforms(0, target.device)
    target.forward(torch.tensor([list(prompt_ids)], device=target.device), cache, taps=False)
    before, last = cache.length, prompt_ids[-1]

    @torch.inference_mode()
    def step() -> float:
        _synchronise(target)
        start = time.perf_counter()
        hidden = target.forward(torch.tensor([[last]], device=target.device), cache, taps=False).hidden_BTH
        decoder.choose(target.logits(hidden[0, -1]), uniforms)
        seconds = time.perf_counter() - start
        cache.rollback(before)
        return seconds

    return step


@torch.inference_mode()
def _round(decoder: SpeculativeDecoder, prompt_ids: Sequence[int]) -> Callable[[], RoundCost]:
    """A function that runs the same round again and again and says what it cost."""
    request = decoder.prefill(prompt_ids, decoder.proposals + 1)
    # The prompt but its last pair goes in beforehand: a round in the middle of a response has a few pairs, not these.
    ids_T, taps_T = request.new_ids_T, request.new_taps_T
    if len(taps_T) > 1:
        request.new_ids_T, request.new_taps_T = ids_T[:-1], taps_T[:-1]
        decoder.propose(request)
        ids_T, taps_T = ids_T[-1:], taps_T[-1:]
        request.proposer.rollback(request.proposer.verified)
    before, drafted = request.cache.length, request.proposer.verified

    @torch.inference_mode()
    def run() -> RoundCost:
        request.new_ids_T, request.new_taps_T = ids_T, taps_T
        _synchronise(decoder.target)
        start = time.perf_counter()
        record = decoder.round(request)
        seconds = time.perf_counter() - start
        request.cache.rollback(before)
        request.proposer.rollback(drafted)
        return RoundCost(record.draft_seconds, seconds - record.draft_seconds)

    return run


# -- acceptance ------------------------------------------------------------------------------------------------------
def chain_tau(run_lengths: Sequence[Sequence[int]], gamma: int) -> float:
    """tau_pooled of a greedy chain of ``gamma``, from the run length at every anchor of each response.

    A run length says how many proposals in a row are right when a round starts there. Only where rounds do start
    counts, and that depends on gamma; hence the walk.
    """
    return sum(map(len, run_lengths)) / sum(len(walk([min(run, gamma) for run in runs])) for runs in run_lengths)


def decoded_tau(
    decoder: SpeculativeDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int = 0
) -> float:
    """tau_pooled of decoding these prompts. Raises ``UserError`` when no answer has two tokens."""
    runs = [decoder.generate(prompt, max_new_tokens, seed) for prompt in prompts]
    rounds = sum(len(run.rounds) for run in runs)
    if not rounds:
        raise UserError("the target's answers are too short to try a draft on; give other prompts")
    return sum(len(run.ids) - 1 for run in runs) / rounds


# -- the choice ------------------------------------------------------------------------------------------------------
def pick_shape(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    run_lengths: Sequence[Sequence[int]] | None = None,
    longest: int = 8,
    trees: Sequence[Shape] | None = None,
    sampler: Sampler | None = None,
    greedy_drafts: bool = False,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Pick:
    """Measure chains of 1 to ``longest`` and the trees, and choose the fastest, or no draft when plain is.

    ``run_lengths`` (of greedy responses, capped at ``longest`` or later) spares decoding chains of a greedy target;
    without them, and always when the target samples, the timed chains are decoded. ``prompts`` are decoded by every
    shape whose tau is not known otherwise, the first one also carries the timings. ``trees`` are ``TREES`` unless
    given, and none for a family that grows no trees and for sampled drafts, which dynamic trees do not go with.

    Raises ``UserError`` without prompts, or when answers are too short to measure.
    """
    if not prompts:
        raise UserError("the shape auto needs prompts to measure on; give at least one")
    timed = sorted({gamma for gamma in TIMED_CHAINS if gamma < longest} | {longest})
    greedy = sampler is None or sampler.greedy
    if trees is None:
        trees = TREES if draft.grows_trees and (greedy or greedy_drafts) else ()
    costs = measure_costs(target, draft, prompts[0], timed, trees, sampler, greedy_drafts)
    walked = run_lengths if greedy and run_lengths is not None and any(map(len, run_lengths)) else None
    candidates = list[Candidate]()
    chains = [ChainShape(gamma) for gamma in (range(1, longest + 1) if walked is not None else timed)]
    for shape in [*chains, *trees]:
        if walked is not None and isinstance(shape, ChainShape):
            tau = chain_tau(walked, shape.gamma)
        else:
            tau = decoded_tau(make_decoder(target, draft, shape, sampler, greedy_drafts), prompts, max_new_tokens, seed)
        seconds = costs.of(shape).seconds
        candidates.append(Candidate(shape, tau, seconds, tau * costs.plain / seconds))
    return choose(candidates, costs)


def choose(candidates: Sequence[Candidate], costs: Costs) -> Pick:
    """The fastest candidate, or no draft when none promises more than plain decoding."""
    # Of equals the smaller, which stands first.
    ordered = sorted(candidates, key=lambda c: c.speedup, reverse=True)
    best, others = ordered[0], "".join(f"; {second}" for second in ordered[1:2])
    if best.speedup <= 1.0:
        sentence = f"no draft: plain decoding is fastest; the best shape, a {best}{others}"
        return Pick(None, ordered, sentence)
    reason = f"{best.tau:.2f} tokens a round that costs {best.round_seconds / costs.plain:.2f} plain steps"
    return Pick(best.shape, ordered, f"{best} ({reason}){others}; plain 1.00x")
