"""The verification rule of chains keeps the target's distribution, and these tests would notice if it did not.

Shape legend: B independent chains, G drafted tokens, V vocabulary.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from redraft.decode.accept import accept_chains, accept_greedy
from redraft.sampling import draw, warp
from redraft.settings.sampler import Sampler

TOYS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toys.py"))))
misfit, normalised, target_logits, toy_pair = TOYS.misfit, TOYS.normalised, TOYS.target_logits, TOYS.toy_pair
right_accepts, right_residual, each_sampler = TOYS.right_accepts, TOYS.right_residual, TOYS.each_sampler
V, DRAWS, MANY, SAMPLERS, G = TOYS.V, TOYS.DRAWS, TOYS.MANY, TOYS.SAMPLERS, 2
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Propose = Callable[[Tensor, Tensor], Tensor]


def fixed(target: Tensor, draft: Tensor, ids: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The rule of greedy drafts: the target draws at every position, the proposals that equal its draws are kept."""
    own = torch.stack([draw(target[:, g], uniforms[:, g]) for g in range(G + 1)], 1)
    # The rule decides about one chain at a time, and many of them are alike: each case is decided once.
    cases, case_B = torch.cat([own, ids], 1).unique(dim=0, return_inverse=True)
    pairs = [accept_greedy(case[: G + 1], case[G + 1 :]) for case in cases.tolist()]
    return tuple(torch.tensor(pairs)[case_B].unbind(1))


def accept_chain(target_GV: Tensor, draft_GV: Tensor, ids_G: Tensor, uniforms_G: Tensor) -> tuple[int, int]:
    """(accepted, next id) of one chain."""
    found = accept_chains(target_GV[None], draft_GV[None], ids_G[None], uniforms_G[None])
    return int(found[0]), int(found[1])


def likeliest(draft_BV: Tensor, uniform_B: Tensor) -> Tensor:
    return draft_BV.argmax(-1)


def generate_triples(
    target: Tensor,
    draft: Tensor,
    rule: Rule,
    proposals: Tensor | None = None,
    seed: int = 0,
    propose: Propose = draw,
    draws: int = DRAWS,
) -> Tensor:
    """Three tokens [draws, 3] a text: one speculative round of two drafts, then plain draws where it fell short.

    ``proposals`` is what the draft really draws from; a liar's differs from the ``draft`` that it claims.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniforms(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    source = draft if proposals is None else proposals
    context = torch.full((draws,), V)
    ids, contexts = [], [context]
    for _ in range(G):
        ids.append(propose(source[contexts[-1]], uniforms(draws)))
        contexts.append(ids[-1])
    draft_ids_BG, context_BG = torch.stack(ids, 1), torch.stack(contexts, 1)
    accepted_B, next_B = rule(target[context_BG], draft[context_BG[:, :G]], draft_ids_BG, uniforms(draws, G + 1))

    tokens = torch.cat([draft_ids_BG, draft_ids_BG.new_zeros(draws, 1)], 1)
    tokens[torch.arange(draws), accepted_B] = next_B
    return TOYS.continued(target, tokens, accepted_B + 1, generator)


def by_hand(accepts: Callable[..., Tensor], residual: Callable[..., Tensor]) -> Rule:
    """The rule written out position by position, with its two parts open to sabotage."""

    def rule(target: Tensor, draft: Tensor, ids: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        size = len(ids)
        accepted, going = torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool)
        weights = target[:, G].clone()
        for g in range(G):
            t, d = target[:, g], draft[:, g]
            tx, dx = (probs.gather(1, ids[:, g : g + 1]).squeeze(1).double() for probs in (t, d))
            ok = accepts(uniforms[:, g], tx, dx)
            stop = going & ~ok
            weights = torch.where(stop[:, None], residual(t, d, dx), weights)
            going = going & ok
            accepted += going
        return accepted, draw(weights, uniforms[:, G])

    return rule


@pytest.mark.parametrize("kind", ["good", "wrong", "overconfident", "uniform", "argmax", "disjoint"])
@each_sampler
def test_three_tokens_follow_the_target_exactly(sampler: Sampler, kind: str) -> None:
    target, draft = toy_pair(sampler, kind)
    assert misfit(generate_triples(target, draft, accept_chains), target) < 4


@pytest.mark.parametrize("kind", ["good", "wrong", "disjoint"])
@each_sampler
def test_greedy_drafts_under_a_sampling_target_change_nothing(sampler: Sampler, kind: str) -> None:
    target, draft = toy_pair(sampler, kind)
    assert misfit(generate_triples(target, draft, fixed, propose=likeliest), target) < 4
    # The same in law, written as rejection against a point mass.
    certain = warp(draft.log(), Sampler())
    assert misfit(generate_triples(target, certain, accept_chains), target) < 4


@pytest.mark.parametrize("sampler", SAMPLERS[:4], ids=lambda s: s.describe())
def test_a_draft_that_proposes_what_it_claims_impossible_changes_nothing(sampler: Sampler) -> None:
    target, draft = toy_pair(sampler, "uniform")
    likeliest = target.argmax(-1, keepdim=True)
    claimed = normalised(draft.scatter(-1, likeliest, 0.0))
    # Half of the proposals are what the draft claims to be impossible, half are drawn from its claim.
    proposals = (claimed + torch.zeros_like(draft).scatter(-1, likeliest, 1.0)) / 2
    assert misfit(generate_triples(target, claimed, accept_chains, proposals=proposals), target) < 4


SABOTAGE = {
    "residual is the target itself": by_hand(right_accepts, lambda t, d, dx: t),
    "residual takes the absolute difference": by_hand(right_accepts, lambda t, d, dx: (t - d).abs()),
    "residual is the draft's excess": by_hand(right_accepts, lambda t, d, dx: (d - t).clamp(min=0) + 1e-9),
    "everything is accepted": by_hand(lambda u, tx, dx: u < 2, right_residual),
    "accepts with the target's probability alone": by_hand(lambda u, tx, dx: u < tx, right_residual),
    "accepts with the ratio upside down": by_hand(lambda u, tx, dx: u < dx / tx, right_residual),
    "accepts a quarter too readily": by_hand(lambda u, tx, dx: u < 1.25 * tx / dx, right_residual),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_statistic_notices_a_broken_rule(name: str) -> None:
    sampler = Sampler(temperature=1.0)
    target, draft = toy_pair(sampler, "wrong")
    assert misfit(generate_triples(target, draft, SABOTAGE[name], draws=MANY), target) > 8
    assert misfit(generate_triples(target, draft, accept_chains, draws=MANY), target) < 4


def test_the_statistic_notices_greedy_drafts_verified_as_draws() -> None:
    sampler = Sampler(temperature=1.0)
    target, draft = toy_pair(sampler, "good")
    assert misfit(generate_triples(target, draft, accept_chains, propose=likeliest), target) > 8


def test_the_statistic_notices_that_an_impossible_token_was_accepted() -> None:
    sampler = Sampler(temperature=1.0)
    target = warp(target_logits(), sampler)
    favourite = target.argmax(-1, keepdim=True)
    claimed = normalised(target.scatter(-1, favourite, 0.0))
    liar = torch.zeros_like(target).scatter(-1, favourite, 1.0)
    trusting = by_hand(lambda u, tx, dx: u * dx < tx, right_residual)
    assert misfit(generate_triples(target, claimed, trusting, proposals=liar), target) > 8
    assert misfit(generate_triples(target, claimed, accept_chains, proposals=liar), target) < 4


@pytest.mark.parametrize("kind", ["good", "wrong", "disjoint"])
def test_agrees_with_the_rule_written_out_by_hand(kind: str) -> None:
    """So the sabotaged rules above differ from the real one in the sabotaged part alone."""
    sampler = Sampler(temperature=0.9, top_k=4)
    target, draft = toy_pair(sampler, kind)
    honest = by_hand(right_accepts, right_residual)
    ours, theirs = (generate_triples(target, draft, rule, seed=3) for rule in (accept_chains, honest))
    assert torch.equal(ours, theirs)


def test_one_chain_is_a_batch_of_one() -> None:
    sampler, generator = Sampler(temperature=1.0), torch.Generator().manual_seed(1)
    target, draft = toy_pair(sampler, "good")
    ids_BG = torch.randint(V, (200, G), generator=generator)
    rows_BG = torch.cat([torch.full((200, 1), V), ids_BG], 1)
    uniforms = torch.rand(200, G + 1, generator=generator)
    accepted_B, next_B = accept_chains(target[rows_BG], draft[rows_BG[:, :G]], ids_BG, uniforms)
    assert set(accepted_B.tolist()) == {0, 1, 2}
    for b in range(200):
        one = accept_chain(target[rows_BG[b]], draft[rows_BG[b, :G]], ids_BG[b], uniforms[b])
        assert one == (int(accepted_B[b]), int(next_B[b]))


def test_equal_rows_up_to_rounding_fall_back_to_the_target() -> None:
    """Rejection with nothing left over: the draft dominates everywhere, as rounding can make it."""
    target = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    draft = torch.tensor([[0.5000002, 0.5000002, 0.0]])
    last = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    for uniform, expected in ((0.2, 0), (0.7, 1)):
        uniforms = torch.tensor([float(last), uniform], dtype=torch.float64)
        assert accept_chain(target, draft, torch.tensor([0]), uniforms) == (0, expected)


def test_a_chain_of_no_drafts_draws_from_the_target() -> None:
    target = torch.tensor([[0.25, 0.0, 0.75]])
    none, no_ids = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert accept_chain(target, none, no_ids, torch.tensor([0.2])) == (0, 0)
    assert accept_chain(target, none, no_ids, torch.tensor([0.3])) == (0, 2)


def test_a_token_the_target_forbids_is_never_accepted() -> None:
    target = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert accept_chain(target, torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.zeros(2)) == (0, 1)


@pytest.mark.parametrize(
    ("targets", "drafts", "expected"),
    [
        ([4, 5, 6], [4, 5], (2, 6)),
        ([4, 5, 6], [4, 9], (1, 5)),
        ([4, 5, 6], [9, 5], (0, 4)),
        ([4], [], (0, 4)),
    ],
)
def test_greedy(targets: list[int], drafts: list[int], expected: tuple[int, int]) -> None:
    assert accept_greedy(targets, drafts) == expected
    assert accept_greedy(torch.tensor(targets), torch.tensor(drafts, dtype=torch.long)) == expected


def test_greedy_agrees_with_the_sampled_rule_on_one_hot_targets() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        logits = torch.randn(G + 1, V, generator=generator)
        ids = torch.where(torch.rand(G, generator=generator) < 0.6, logits[:G].argmax(-1), torch.tensor(0))
        draft = torch.full((G, V), 1 / V)
        sampled = accept_chain(warp(logits, Sampler()), draft, ids, torch.rand(G + 1, generator=generator))
        assert sampled == accept_greedy(logits.argmax(-1), ids)
