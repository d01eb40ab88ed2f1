"""Low-rank updates that begin where the gradient is: the draft stays what it was, the directions lead."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from redraft.attic.aim import aim_updates, leading_directions, waiting
from redraft.drafts.layers import Linear
from redraft.settings.training import METHODS, PrivateSize


class Two(nn.Module):
    """Two layers, of which the second has no say in the loss."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.used, self.unused, self.bare = Linear(24, 10), Linear(24, 10), Linear(24, 10)
        for layer in (self.used, self.unused):
            layer.attach_low_rank(rank, generator=torch.Generator().manual_seed(1))
            layer.low_rank.aim = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("low_rank" in name)


def test_rows_are_the_leading_directions_as_long_as_before_and_nothing_else_changes() -> None:
    model = Two(4)
    # Inputs of four directions alone: the gradient of the matrix lies in their span.
    basis = torch.linalg.qr(torch.randn(24, 4)).Q
    x = torch.randn(50, 4) @ basis.T
    before, untouched = copy.deepcopy(model.used.low_rank), model.unused.low_rank.inner.detach().clone()
    expected = model.used(x).detach()
    aim_updates(model, lambda: (model.used(x) ** 2).sum().backward())
    inner = model.used.low_rank.inner.detach()
    assert torch.allclose(inner @ basis @ basis.T, inner, atol=1e-5), "all of it lies where the inputs do"
    length = before.inner.norm(dim=1).mean()
    torch.testing.assert_close(inner @ inner.T, torch.eye(4) * length**2)
    assert torch.equal(model.used(x), expected) and not model.used.low_rank.outer.any()
    assert torch.equal(model.unused.low_rank.inner, untouched), "no gradient, nothing to aim at"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.low_rank.{part}" for layer in ("used", "unused") for part in ("inner", "outer")
    }
    assert waiting(model) == []


def test_a_rank_above_the_sides_keeps_the_rows_that_have_no_direction() -> None:
    model = Two(14)
    before = model.used.low_rank.inner.detach().clone()
    aim_updates(model, lambda: (model.used(torch.randn(50, 24)) ** 2).sum().backward())
    inner = model.used.low_rank.inner.detach()
    assert torch.equal(inner[10:], before[10:]) and not torch.equal(inner[:10], before[:10])


def test_a_loss_that_stops_leaves_the_updates_waiting_and_the_matrices_frozen() -> None:
    model = Two(4)
    before = model.used.low_rank.inner.detach().clone()

    def backward() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aim_updates(model, backward)
    assert torch.equal(model.used.low_rank.inner, before) and len(waiting(model)) == 2
    assert not model.used.weight.requires_grad


def test_the_decomposition_is_exact_where_it_counts() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(200, 12) @ torch.randn(12, 160) + 0.05 * torch.randn(200, 160)
    found = leading_directions(gradient, 8)
    _, values, right = torch.linalg.svd(gradient)
    assert (gradient @ found.T).square().sum() >= 0.999 * values[:8].square().sum()
    torch.testing.assert_close(found @ found.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close((found @ right[:12].T).norm(dim=1), torch.ones(8), atol=1e-2, rtol=0)
    state = torch.get_rng_state()
    assert torch.equal(leading_directions(gradient, 8), found) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["lora", "lora-peer"])
def test_updates_begin_at_random_unless_asked(name: str) -> None:
    assert not METHODS[name].size(PrivateSize()).aim and METHODS[name].size(PrivateSize(aim=True)).aim
