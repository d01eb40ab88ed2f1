"""the shape auto: exact acceptance of every chain from one pass, measured costs, and a choice that is explained."""

from __future__ import annotations

import pytest
import torch

from redraft.adaptation.bench import auto_shape
from redraft.adaptation.probe import greedy_answers
from redraft.data.generate import Request, generate
from redraft.decode.auto import (
    Candidate,
    Costs,
    RoundCost,
    chain_tau,
    choose,
    decoded_tau,
    make_decoder,
    measure_costs,
    pick_shape,
)
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, DynamicTree, StaticTree
from redraft.target import Target

COSTS = Costs(1.0, {ChainShape(1): RoundCost(0.1, 1.0), ChainShape(4): RoundCost(0.4, 1.3)})


@pytest.fixture
def pair(tiny_target) -> tuple[Target, Eagle3Draft, list[Prompt]]:
    target = tiny_target("llama", initializer_range=0.05, num_hidden_layers=3, taps=(1, 2, 3))
    prompts = [Prompt(str(i), [5 + i, 9, 70 - i, 33]) for i in range(4)]
    return target, fresh_draft(target, list(range(120)), seed=1), prompts


def test_tau_walks_rounds_and_does_not_average_positions():
    """By hand: a chain of one starts rounds at anchors 0, 2, 3 and 4 of the first response, one of two at 0, 3, 4."""
    runs = [[2, 1, 0, 0, 3], [0]]
    assert chain_tau(runs, 1) == 6 / 5
    assert chain_tau(runs, 2) == 6 / 4
    assert chain_tau([[0, 1], []], 3) == 1.0


def test_walked_tau_is_that_of_decoding(pair):
    """Every chain length from one pass of the longest; the rounds of each are those of a real decoder."""
    target, draft, prompts = pair
    with torch.inference_mode(), greedy_answers(target, draft.taps, prompts, 24) as (rows, store):
        runs = [found for _, found in draft.eval().walk(target).runs(rows, store, 6)]
    taus = []
    for gamma in (1, 2, 4, 6):
        decoder, decoded = make_decoder(target, draft, ChainShape(gamma)), []
        generate = decoder.generate
        decoder.generate = lambda *rest, generate=generate, kept=decoded: kept.append(generate(*rest)) or kept[-1]
        tau = decoded_tau(decoder, [row.prompt_ids for row in rows], 24)
        tokens, rounds = sum(len(g.ids) - 1 for g in decoded), sum(len(g.rounds) for g in decoded)
        taus.append(chain_tau(runs, gamma))
        assert len(decoded) == len(rows)
        assert taus[-1] == pytest.approx(tokens / rounds)
        assert tau == pytest.approx(taus[-1])
    assert taus == sorted(taus) and taus[0] < taus[-1], "longer chains must keep more, or nothing was compared"


def test_costs_between_timed_lengths_lie_on_the_line():
    assert COSTS.of(ChainShape(4)) == RoundCost(0.4, 1.3)
    between = COSTS.of(ChainShape(2))
    assert between.draft == pytest.approx(0.2) and between.verify == pytest.approx(1.1)


def test_measured_costs_leave_the_caches_alone(pair, monkeypatch):
    """Every timed round starts from the same state, so that costs do not creep with the length."""
    target, draft, prompts = pair
    seen: dict[str, set[tuple[int, int]]] = {}
    from redraft.decode.engine import ChainDecoder
    from redraft.decode.tree import TreeDecoder

    for kind in (ChainDecoder, TreeDecoder):

        def watch(self, request, original=kind.round):
            seen.setdefault(str(self.proposals), set()).add((request.cache.length, request.proposer.verified))
            return original(self, request)

        monkeypatch.setattr(kind, "round", watch)
    tree = DynamicTree(2, 2, 5)
    costs = measure_costs(target, draft, prompts[0].ids, (1, 3), [tree], repeats=2)
    assert seen == {"1": {(4, 3)}, "3": {(4, 3)}, "5": {(4, 3)}}
    assert list(costs.rounds) == [ChainShape(1), ChainShape(3), tree]
    assert costs.plain > 0 and all(c.draft > 0 and c.verify > 0 for c in costs.rounds.values())


def candidate(gamma: int, tau: float) -> Candidate:
    seconds = COSTS.of(ChainShape(gamma)).seconds
    return Candidate(ChainShape(gamma), tau, seconds, tau / seconds)


def test_the_fastest_is_chosen_and_explained():
    pick = choose([candidate(1, 1.5), candidate(2, 2.1), candidate(4, 2.2)], COSTS)
    assert pick.shape == ChainShape(2)
    assert [c.shape.gamma for c in pick.candidates] == [2, 1, 4]
    assert pick.sentence == (
        "chain of 2: predicted 1.62x (2.10 tokens a round that costs 1.30 plain steps); "
        "chain of 1: predicted 1.36x; plain 1.00x"
    )


def test_no_draft_is_an_outcome_that_is_said():
    pick = choose([candidate(1, 1.05), candidate(4, 1.1)], COSTS)
    assert pick.shape is None
    assert pick.sentence.startswith(
        "no draft: plain decoding is fastest; the best shape, a chain of 1: predicted 0.95x"
    )


def test_auto_compares_chains_of_every_length_and_trees(pair):
    target, draft, prompts = pair
    trees = [DynamicTree(2, 2, 4), StaticTree(((0,), (1,), (0, 0)))]
    pick = auto_shape(target, draft, prompts, longest=3, trees=trees, max_new_tokens=16)
    shapes = {c.shape: c for c in pick.candidates}
    assert set(shapes) == {*(ChainShape(g) for g in (1, 2, 3)), *trees}
    speedups = [c.speedup for c in pick.candidates]
    assert speedups == sorted(speedups, reverse=True)
    assert (pick.shape is None) == (speedups[0] <= 1) and (pick.shape or pick.candidates[0].shape) in shapes
    for shape in trees:
        tau = decoded_tau(make_decoder(target, draft, shape), [p.ids for p in prompts[:3]], 16)
        assert shapes[shape].tau == pytest.approx(tau)


def test_a_sampling_target_decodes_its_chains(pair):
    target, draft, prompts = pair
    pick = auto_shape(target, draft, prompts, Sampler(0.9), longest=2, max_new_tokens=8)
    assert {c.shape for c in pick.candidates} == {ChainShape(1), ChainShape(2)}, "a dynamic tree is no draw"
    expected = decoded_tau(make_decoder(target, draft, ChainShape(2), Sampler(0.9)), [p.ids for p in prompts[:3]], 8)
    assert {c.shape: c.tau for c in pick.candidates}[ChainShape(2)] == pytest.approx(expected)


def test_nothing_to_measure_is_said(pair):
    target, draft, prompts = pair
    with pytest.raises(UserError, match="prompts"):
        pick_shape(target, draft, [])
    short = [c.response_ids for c in generate(target, [Request("0", prompts[0].ids, Sampler())], 1)]
    assert len(short[0]) == 1
    with pytest.raises(UserError, match="too short"):
        decoded_tau(make_decoder(target, draft, ChainShape(2)), [prompts[0].ids], 1)
