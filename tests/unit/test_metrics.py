"""Metrics on rounds small enough to count by hand."""

from __future__ import annotations

import math

import pytest
import torch

from redraft import metrics

ROUNDS = [[2, 0, 3], [1]]  # 3 + 1 + 4 and 2 tokens
OF_THREE = [[3, 3, 3], [3]]


def test_acceptance_by_position() -> None:
    conditional, unconditional = metrics.acceptance_by_position(ROUNDS, OF_THREE, 3)
    assert conditional == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert unconditional == pytest.approx([3 / 4, 2 / 4, 1 / 4])
    assert 1 + sum(unconditional) == pytest.approx(10 / 4)  # tokens over rounds


def test_acceptance_counts_only_rounds_that_proposed_the_position() -> None:
    conditional, unconditional = metrics.acceptance_by_position(ROUNDS, [[3, 3, 3], [1]], 3)
    assert conditional == pytest.approx([3 / 4, 2 / 2, 1 / 2])
    assert unconditional == pytest.approx([3 / 4, 2 / 3, 1 / 3])
    assert math.isnan(metrics.acceptance_by_position([[0]], [[2]], 2)[0][1])
    assert all(map(math.isnan, metrics.acceptance_by_position([[]], [[]], 1)[1]))
    with pytest.raises(ValueError, match="accepted 3 of 2"):
        metrics.acceptance_by_position(ROUNDS, [[2, 2, 2], [2]], 2)


def test_overlap_is_one_minus_total_variation() -> None:
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 30, 9, generator=generator, dtype=torch.float64).softmax(-1)
    variation = 0.5 * (target - draft).abs().sum(-1)
    torch.testing.assert_close(metrics.overlap(target, draft), 1 - variation)
    torch.testing.assert_close(metrics.overlap(target, target), torch.ones(30, dtype=torch.float64))


def test_a_greedy_draft_is_kept_with_the_targets_probability_of_its_proposal() -> None:
    target = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    point = torch.nn.functional.one_hot(torch.tensor([0, 2]), 3).float()
    assert metrics.overlap(target, point).tolist() == pytest.approx([0.7, 0.3])


def test_costs() -> None:
    assert metrics.cost_by_bytes(2 * 50e6, 0.5 * 400e6) == pytest.approx(0.5)
    assert metrics.cost_by_time(1.0, 100, 2.0, 20) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="positive"):
        metrics.cost_by_bytes(1.0, 0.0)
    with pytest.raises(ValueError, match="positive"):
        metrics.cost_by_time(1.0, 0, 2.0, 20)


def test_mbsu() -> None:
    assert metrics.mbsu(3.0, gamma=5, cost=0.1) == pytest.approx(2.0)
    assert metrics.mbsu(3.0, gamma=5, cost=0.0) == 3.0
