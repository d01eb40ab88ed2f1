"""Several experts and their routers: equal to the sum written out, balanced, and nothing at all when there is one.

Shape legend: N tokens, H hidden size, E experts.
"""

from __future__ import annotations

import copy

import pytest
import torch

from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.drafts.base import DraftConfig
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft, fresh_draft
from redraft.drafts.files import load_draft, save_draft
from redraft.drafts.groups import attach_private, prepare
from redraft.drafts.layers import GatedMLP, Router, SharedPrivateMLP
from redraft.errors import UserError
from redraft.registries import EXPORTERS, FAMILIES
from redraft.settings.training import PrivateSize, mergeable
from redraft.training.optimizer import make_optimizers

H = 8


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def tokens(count: int = 6, seed: int = 9) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


def expert(mlp: GatedMLP, number: int, experts: int) -> GatedMLP:
    """Expert ``number`` of a routed MLP as an MLP of its own."""
    width = mlp.gate_proj.weight.shape[0] // experts
    rows = slice(number * width, (number + 1) * width)
    alone = GatedMLP(H, width)
    with torch.no_grad():
        alone.gate_proj.weight.copy_(mlp.gate_proj.weight[rows])
        alone.up_proj.weight.copy_(mlp.up_proj.weight[rows])
        alone.down_proj.weight.copy_(mlp.down_proj.weight[:, rows])
    return alone


@pytest.mark.parametrize("experts", [2, 3, 4])
@pytest.mark.parametrize("active", [1, 2])
def test_a_routed_mlp_is_the_weighted_sum_of_the_best_experts(experts, active):
    mlp = GatedMLP(H, 12, experts, active)
    randomise(mlp)
    for x in tokens():
        scores = mlp.router.weight @ x
        best = scores.topk(active).indices.tolist()
        weights = scores[best].softmax(0)
        expected = sum(w * expert(mlp, e, experts)(x) for w, e in zip(weights, best, strict=True))
        torch.testing.assert_close(mlp(x[None])[0], expected, atol=1e-6, rtol=1e-5)


def test_both_sides_have_routers_of_their_own():
    parts = DraftConfig(private_width=6, private_experts=3, private_active=2, shared_experts=4, shared_active=2)
    mlp = SharedPrivateMLP(H, 12, parts)
    randomise(mlp)
    x = tokens(1)
    expected = torch.zeros(H)
    for side, experts, total in ((mlp, 4, 2.0), (mlp.private, 3, 1.0)):
        scores = (side.router.weight @ x[0]).topk(2)
        for weight, e in zip(scores.values.softmax(0) * total, scores.indices.tolist(), strict=True):
            expected = expected + weight * expert(side, e, experts)(x[0])
    torch.testing.assert_close(mlp(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_counts_that_cannot_be_build_no_mlp():
    for counts in ((0, 0), (2, 3), (5, 1)):
        with pytest.raises(ValueError, match="experts of an inner width of 12"):
            GatedMLP(H, 12, *counts)


@pytest.mark.parametrize("experts", range(1, 65))
def test_equal_scores_weigh_all_slices_with_exactly_one(experts):
    weights = Router(H, experts, experts, total=experts)(tokens())
    assert torch.equal(weights, torch.ones(6, experts))


# -- the load-balancing term -----------------------------------------------------------------------------------------
def test_the_balance_is_one_when_even_and_the_number_of_experts_when_one_takes_all():
    router = Router(2, 2, 1, 1.0)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[20.0, 0.0], [0.0, 20.0]]))
    router(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert router.balance().item() == pytest.approx(1.0)
    router(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert router.balance().item() == pytest.approx(2.0)


def test_the_balance_pools_all_passes_since_it_was_last_asked_for():
    router, x = Router(H, 4, 2, 1.0), tokens(12)
    randomise(router)
    assert router.balance() is None
    router(x)
    whole = router.balance()
    router(x[:5])
    router(x[5:])
    torch.testing.assert_close(router.balance(), whole)
    assert router.balance() is None


def test_nothing_is_noted_outside_training():
    router, x = Router(H, 4, 2, 1.0), tokens()
    with torch.no_grad():
        router(x)
    router.eval()(x)
    assert router.balance() is None
    Router(H, 4, 4, 4.0)(x)  # all of them: there is nothing to balance
    router.train()(x)
    assert copy.deepcopy(router).balance() is None and router.balance() is not None


def test_the_balance_alone_spreads_a_collapsed_router():
    router, x = Router(H, 4, 1, 1.0), tokens(64).abs()
    with torch.no_grad():
        router.weight[0] = 0.3
    optimizer = torch.optim.Adam(router.parameters(), 0.02)
    terms = []
    for _ in range(60):
        router(x)
        term = router.balance()
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        terms.append(term.item())
    assert terms[0] > 1.3 and terms[-1] < 1.1


# -- in a draft ------------------------------------------------------------------------------------------------------
@pytest.fixture
def target(tiny_target):
    return tiny_target("llama")


@pytest.fixture
def draft(target) -> Eagle3Draft:
    return fresh_draft(target, range(0, 120, 2), seed=3, intermediate=66)


def step(draft: Eagle3Draft, seed: int = 0) -> torch.Tensor:
    """Logits of one step in which every position sees itself alone."""
    generator = torch.Generator().manual_seed(seed)
    taps = torch.randn(7, len(draft.config.taps) * draft.config.target_hidden_size, generator=generator)
    embeds = torch.randn(7, draft.config.hidden_size, generator=generator)

    def attend(query, keys, values):
        return values.repeat_interleave(query.shape[1] // values.shape[1], 1)

    return draft.logits(draft(embeds, draft.fuse(taps), torch.arange(7), [attend] * draft.config.num_layers))


def test_one_expert_on_each_side_is_eda_bit_for_bit(draft):
    eda, names = prepare(copy.deepcopy(draft), "eda", PrivateSize(16), seed=5)
    size = PrivateSize(16, experts=1, active=1)
    moe, moe_names = prepare(copy.deepcopy(draft), "eda-moe", size, seed=5)
    assert mergeable("eda-moe", size) and moe.config == eda.config and moe_names == names
    for split in (eda, moe):
        optimizer = torch.optim.AdamW([p for p in split.parameters() if p.requires_grad], 1e-2)
        for number in range(3):
            optimizer.zero_grad()
            (step(split, number).logsumexp(-1).sum() + split.extra_loss()).backward()
            optimizer.step()
    expected = eda.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in moe.state_dict().items())
    assert torch.equal(step(moe), step(eda)) and torch.equal(step(moe.merged()), step(eda.merged()))
    assert not torch.equal(step(moe), step(draft))


@pytest.mark.parametrize("slices", [2, 3, 6, 11, 66])
def test_slices_of_the_old_mlp_change_no_bit_while_all_are_active(slices, draft):
    split = attach_private(draft, 12, experts=3, active=2, shared_experts=slices)
    assert split.midlayer.mlp.router.experts == slices
    assert torch.equal(step(split), step(draft))
    fewer = attach_private(draft, 12, shared_experts=slices, shared_active=1)
    assert not torch.allclose(step(fewer), step(draft), atol=1e-4)


def test_the_extra_loss_is_the_weighted_sum_of_both_routers_and_reaches_them(draft):
    split = attach_private(draft, 16, experts=4, active=2, shared_experts=6, shared_active=3, balance=0.5)
    randomise(split)
    assert float(split.extra_loss()) == 0.0
    step(split)
    mlp = split.midlayer.mlp
    parts = [copy.copy(router.seen) for router in (mlp.router, mlp.private.router)]
    found = split.extra_loss()
    for router, seen in zip((mlp.router, mlp.private.router), parts, strict=True):
        router.seen = seen
    expected = 0.5 * (mlp.router.balance() + mlp.private.router.balance())
    torch.testing.assert_close(found, expected)
    found.backward()
    for router in (mlp.router, mlp.private.router):
        assert bool(router.weight.grad.any())
    assert float(split.extra_loss()) == 0.0 and float(draft.extra_loss()) == 0.0


def test_routers_take_no_orthogonal_steps(draft):
    ready, names = prepare(draft, "eda-moe", PrivateSize(16, shared_experts=3))
    muon, adamw = make_optimizers([(n, p) for n, p in ready.named_parameters() if n in names], "muon", 0.0).parts
    mlp = ready.midlayer.mlp
    routers = {id(mlp.router.weight), id(mlp.private.router.weight)}
    assert {id(p) for group in adamw.param_groups for p in group["params"]} == routers
    assert len(muon.param_groups[0]["params"]) == 3


def test_routed_drafts_are_stored_whole(draft, tmp_path):
    split = attach_private(draft, 16, experts=4, active=2, shared_experts=6, shared_active=3, balance=0.5)
    randomise(split)
    save_draft(tmp_path / "draft", split, {})
    again, _ = load_draft(tmp_path / "draft")
    assert again.config == split.config and torch.equal(step(again), step(split))


def test_settings_of_earlier_versions_mean_one_expert(draft):
    old = {k: v for k, v in draft.config.to_dict().items() if "_experts" not in k and "_active" not in k}
    old = {k: v for k, v in old.items() if k not in ("balance", "low_rank_alpha")}
    assert Eagle3Config.from_dict(old) == draft.config


def test_decoding_with_routed_experts_gives_the_same_tokens(draft, target):
    split = attach_private(draft, 16, experts=4, active=2, shared_experts=3)
    randomise(split.midlayer.mlp.private)
    for prompt in ([5, 9, 30], [64, 7, 8, 9, 10]):
        plain = PlainDecoder(target).generate(prompt, 16)
        assert ChainDecoder(target, split, 3).generate(prompt, 16).ids == plain.ids


def test_no_exporter_takes_routed_experts(draft, target, tmp_path):
    private = attach_private(draft, 16, experts=4, active=2)
    both = attach_private(draft, 16, shared_experts=3)
    for name in FAMILIES.get(draft.family).writers:
        with pytest.raises(UserError, match="2 of 4 private experts.*cannot be merged or exported"):
            EXPORTERS.get(name)(private, tmp_path / name, target)
        with pytest.raises(UserError, match="3 of 3 shared experts"):
            EXPORTERS.get(name)(both, tmp_path / name, target)
        assert not (tmp_path / name).exists()
