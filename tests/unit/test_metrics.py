"""Metrics on rounds small enough to count by hand."""

from __future__ import annotations

import math

import pytest
import torch

from redraft import metrics

ROUNDS = [[2, 0, 3], [1]]  # 3 + 1 + 4 and 2 tokens


def test_tau_pooled_and_macro_differ_as_defined() -> None:
    assert metrics.tokens_of_rounds(ROUNDS) == [8, 2]
    assert metrics.tau_pooled(ROUNDS) == pytest.approx(10 / 4)
    assert metrics.tau_macro(ROUNDS) == pytest.approx((8 / 3 + 2) / 2)


def test_a_cut_last_round_counts_only_the_tokens_that_were_produced() -> None:
    tokens = [6, 1]  # the last rounds accepted 3 and 1, the stop rule left 2 and 1 tokens of them
    assert metrics.tau_pooled(ROUNDS, tokens) == pytest.approx(7 / 4)
    assert metrics.tau_macro(ROUNDS, tokens) == pytest.approx((6 / 3 + 1) / 2)
    assert metrics.acceptance_unconditional(ROUNDS, 3, 3) == [0.75, 0.5, 0.25]


@pytest.mark.parametrize("tokens", [[4, 2], [9, 2], [8, 0], [8]])
def test_token_counts_that_contradict_the_rounds_are_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError):
        metrics.tau_pooled(ROUNDS, tokens)


def test_requests_without_a_round_are_left_out() -> None:
    assert metrics.tau_macro([*ROUNDS, []], [8, 2, 0]) == metrics.tau_macro(ROUNDS)
    assert metrics.tau_pooled([*ROUNDS, []]) == metrics.tau_pooled(ROUNDS)
    assert math.isnan(metrics.tau_pooled([[]])) and math.isnan(metrics.tau_macro([]))


def test_block_efficiency_is_bounded_by_the_chain() -> None:
    assert metrics.block_efficiency([[3, 3]], gamma=3) == 4
    with pytest.raises(ValueError, match="more than gamma"):
        metrics.block_efficiency(ROUNDS, gamma=2)


def test_acceptance_by_position() -> None:
    assert metrics.acceptance_conditional(ROUNDS, 3, 3) == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert metrics.acceptance_unconditional(ROUNDS, 3, 3) == pytest.approx([3 / 4, 2 / 4, 1 / 4])
    assert 1 + sum(metrics.acceptance_unconditional(ROUNDS, 3, 3)) == pytest.approx(metrics.tau_pooled(ROUNDS))


def test_acceptance_counts_only_rounds_that_proposed_the_position() -> None:
    drafted = [[3, 3, 3], [1]]
    assert metrics.acceptance_conditional(ROUNDS, drafted, 3) == pytest.approx([3 / 4, 2 / 2, 1 / 2])
    assert metrics.acceptance_unconditional(ROUNDS, drafted, 3) == pytest.approx([3 / 4, 2 / 3, 1 / 3])
    assert math.isnan(metrics.acceptance_conditional([[0]], 2, 2)[1])
    with pytest.raises(ValueError, match="accepted 3 of 2"):
        metrics.acceptance_conditional(ROUNDS, 2, 2)


def test_alpha_is_one_minus_total_variation() -> None:
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 30, 9, generator=generator, dtype=torch.float64).softmax(-1)
    variation = 0.5 * (target - draft).abs().sum(-1)
    assert metrics.alpha(target, draft) == pytest.approx(float((1 - variation).mean()))
    assert metrics.alpha(target, target) == pytest.approx(1.0)
    assert metrics.overlap(target, draft).shape == (30,)


def test_alpha_of_greedy_drafts_is_the_targets_probability_of_the_proposal() -> None:
    target = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    ids = torch.tensor([0, 2])
    point = torch.nn.functional.one_hot(ids, 3).float()
    assert metrics.point_overlap(target, ids).tolist() == pytest.approx([0.7, 0.3])
    torch.testing.assert_close(metrics.overlap(target, point), metrics.point_overlap(target, ids))
    assert metrics.alpha_greedy_drafts(target, ids) == pytest.approx(0.5)
    assert metrics.alpha_greedy_drafts(target, ids) == pytest.approx(metrics.alpha(target, point))


def test_greedy_drafts_can_beat_sampled_ones_and_lose_to_them() -> None:
    flat, sharp = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    assert metrics.alpha_greedy_drafts(sharp, torch.tensor([0])) > metrics.alpha(sharp, flat)
    assert metrics.alpha_greedy_drafts(flat, torch.tensor([0])) < metrics.alpha(flat, sharp)


def test_a_tree_is_measured_by_depth() -> None:
    """Trees of depth 3 and 12 nodes: the same figures as a chain of 3, and its own share of kept tokens."""
    assert metrics.acceptance_conditional(ROUNDS, [[3, 3, 3], [3]], 3) == metrics.acceptance_conditional(ROUNDS, 3, 3)
    assert metrics.block_efficiency(ROUNDS, gamma=3) == metrics.tau_pooled(ROUNDS)
    assert metrics.token_acceptance(ROUNDS, 12) == pytest.approx(6 / 48)
    assert metrics.token_acceptance(ROUNDS, [[3, 3, 3], [1]]) == pytest.approx(6 / 10)
    assert math.isnan(metrics.token_acceptance([[]], 3))
    with pytest.raises(ValueError, match="accepted 3 of 2"):
        metrics.token_acceptance(ROUNDS, 2)


def test_costs() -> None:
    assert metrics.cost_by_bytes(2 * 50e6, 0.5 * 400e6) == pytest.approx(0.5)
    assert metrics.cost_by_time(1.0, 100, 2.0, 20) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="positive"):
        metrics.cost_by_bytes(1.0, 0.0)
    with pytest.raises(ValueError, match="positive"):
        metrics.cost_by_time(1.0, 0, 2.0, 20)


def test_ideal_speedup_and_mbsu() -> None:
    assert metrics.ideal_speedup(3.0, draft_steps=5, cost=0.1) == pytest.approx(2.0)
    assert metrics.ideal_speedup(3.0, draft_steps=5, cost=0.1, verify_cost=1.5) == pytest.approx(1.5)
    assert metrics.mbsu(3.0, gamma=5, cost=0.1) == pytest.approx(2.0)
    assert metrics.mbsu(3.0, gamma=5, cost=0.0) == 3.0


def test_recovery() -> None:
    assert metrics.recovery(1.9, 1.0, 2.0) == pytest.approx(0.9)
    assert math.isnan(metrics.recovery(1.0, 2.0, 2.0))
