"""What every registered loss must keep; a new loss inherits these tests by being registered.

Shape legend: N positions, D draft vocabulary.
"""

from __future__ import annotations

import math
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from redraft.losses import Loss
from redraft.losses.tvdpp import mean_and_std
from redraft.losses.tvdpp_sampled import sampled_policy_gradient
from redraft.registries import LOSSES, Registry
from redraft.sampling import draw

N, D = 12, 7


# A loss of a package of its own, whose gradient is left to autograd.
EXAMPLE = Path(__file__).parents[1] / "plugin_example" / "src" / "redraft_plugin_example" / "__init__.py"
PLAIN = "by autograd"


@pytest.fixture(params=[*LOSSES.names(), PLAIN])
def loss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Loss:
    if request.param != PLAIN:
        return LOSSES.get(request.param)
    monkeypatch.setattr(Registry, "register", lambda self, name: lambda entry: entry)  # registered for nobody else
    return runpy.run_path(str(EXAMPLE))["hellinger"]


def logits(seed: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(N, D, generator=generator, dtype=torch.float64) * scale).to(dtype)


def gradient(loss: Loss, draft: Tensor, teacher: Tensor, weight: Tensor | None = None, draws: int = 1) -> Tensor:
    """The gradient of the sum; of a sampled loss, the mean over ``draws``."""
    copies = draws if getattr(loss, "sampled", False) else 1
    leaf = draft.repeat(copies, 1).requires_grad_()
    total, _ = loss(leaf, teacher.repeat(copies, 1), None if weight is None else weight.repeat(copies))
    (found,) = torch.autograd.grad(total, leaf)
    return found.view(copies, *draft.shape).mean(0)


def held(loss: Loss, draft: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Loss:
    """The loss with what it does not differentiate fixed at these logits."""
    return loss.hold(draft, teacher, weight) if hasattr(loss, "hold") else loss


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_equal_distributions_are_the_minimum(loss: Loss) -> None:
    teacher = logits(0)
    least, _ = loss(teacher + 3.0, teacher, None)  # a constant on the logits changes no distribution
    assert torch.allclose(gradient(loss, teacher, teacher), torch.zeros(N, D, dtype=torch.float64), atol=1e-12)
    for scale in (1e-3, 0.1, 3.0):
        assert loss(teacher + logits(1, scale=scale), teacher, None)[0] > least
    stated = float(loss.least(teacher, None)) if hasattr(loss, "least") else 0.0
    assert least == pytest.approx(stated, abs=1e-12)


def test_never_negative(loss: Loss) -> None:
    for seed in range(20):
        for draft in (logits(seed), logits(seed, scale=60.0), logits(50 + seed) + 1e-7):
            total, _ = loss(draft.float(), logits(50 + seed).float(), None)
            assert torch.isfinite(total) and total >= -1e-5  # but for rounding


def test_gradient_equals_finite_differences(loss: Loss) -> None:
    teacher, weight = logits(1), torch.linspace(0.1, 2.0, N, dtype=torch.float64)
    draft = logits(2).requires_grad_()
    fixed = held(loss, draft.detach(), teacher, weight)
    if not getattr(loss, "sampled", False):
        assert torch.autograd.gradcheck(lambda x: fixed(x, teacher, weight)[0], (draft,), eps=1e-6, atol=1e-7)
        return
    slopes = torch.empty(N, D, dtype=torch.float64)
    with torch.no_grad():
        for place in torch.cartesian_prod(torch.arange(N), torch.arange(D)):
            step = torch.zeros(N, D, dtype=torch.float64)
            step[tuple(place)] = 1e-6
            both = [fixed(draft + side * step, teacher, weight)[0] for side in (1, -1)]
            slopes[tuple(place)] = (both[0] - both[1]) / 2e-6
    # An element of one draw spreads by about its weight of at most 2, so the mean of 40,000 by 0.01.
    assert torch.allclose(gradient(loss, draft.detach(), teacher, weight, draws=40_000), slopes, atol=0.05, rtol=0)


def test_gradient_descent_reaches_the_teacher(loss: Loss) -> None:
    teacher, draft = logits(3, scale=1.0), logits(4, scale=1.0)
    least = loss.least(teacher, None) if hasattr(loss, "least") else 0.0
    start = loss(draft, teacher, None)[0] - least
    for _ in range(500):
        draft = draft - 0.3 * gradient(loss, draft, teacher, draws=16)
    assert loss(draft, teacher, None)[0] - least < 0.2 * start


def test_sum_over_split_batches_equals_the_whole(loss: Loss) -> None:
    draft, teacher, weight = logits(5), logits(6), torch.rand(N, dtype=torch.float64)
    whole, count = loss(draft, teacher, weight)
    cuts, share = ((0, 1), (1, 8), (8, N)), loss
    if hasattr(loss, "statistics"):
        # Each part adds its own to the sums, and all are given the total: chunks of a batch, or workers.
        totals = sum(loss.statistics(draft[a:b], teacher[a:b], weight[a:b]) for a, b in cuts)
        share = partial(loss, statistics=totals)
    parts = [share(draft[a:b], teacher[a:b], weight[a:b]) for a, b in cuts]
    assert torch.allclose(sum(p[0] for p in parts), whole)
    assert torch.allclose(sum(p[1] for p in parts), count)
    assert torch.allclose(count, weight.sum())
    if not getattr(loss, "sampled", False):
        pieces = [gradient(share, draft[a:b], teacher[a:b], weight[a:b]) for a, b in cuts]
        assert torch.allclose(torch.cat(pieces), gradient(loss, draft, teacher, weight))


def test_weights_scale_rows_and_none_means_one_each(loss: Loss) -> None:
    draft, teacher = logits(7), logits(8)
    plain, count = loss(draft, teacher, None)
    ones, ones_count = loss(draft, teacher, torch.ones(N))
    assert torch.allclose(plain, ones) and count == ones_count == N
    doubled, _ = loss(draft, teacher, torch.full((N,), 2.0))
    assert torch.allclose(doubled, 2 * plain)


def test_rows_of_weight_zero_get_no_gradient(loss: Loss) -> None:
    draft, teacher, weight = logits(9), logits(10), torch.ones(N)
    weight[::3] = 0
    found = gradient(loss, draft, teacher, weight)
    assert not found[::3].any() and found[1::3].any(-1).all()
    assert torch.allclose(loss(draft, teacher, weight)[0], loss(draft[weight > 0], teacher[weight > 0], None)[0])


def test_no_positions_give_zero_over_zero(loss: Loss) -> None:
    total, count = loss(logits(0)[:0], logits(1)[:0], None)
    assert total == 0 and count == 0


def test_bfloat16_logits_are_computed_in_float32(loss: Loss) -> None:
    draft, teacher = logits(11, torch.bfloat16), logits(12, torch.bfloat16)
    total, count = loss(draft, teacher, None)
    exact, _ = loss(draft.double(), teacher.double(), None)
    assert total.dtype == count.dtype == torch.float32
    assert torch.allclose(total.double(), exact, rtol=1e-5)
    torch.manual_seed(1)
    found = gradient(loss, draft, teacher)
    assert found.dtype == torch.bfloat16
    torch.manual_seed(1)
    assert torch.allclose(found.double(), gradient(loss, draft.double(), teacher.double()), atol=0, rtol=0.02)


def test_works_without_a_gradient_and_gives_the_same_value(loss: Loss) -> None:
    draft, teacher = logits(15), logits(16)
    tracked, _ = loss(draft.clone().requires_grad_(), teacher, None)
    with torch.no_grad():
        assert torch.equal(loss(draft, teacher, None)[0], tracked.detach())


def test_tokens_that_the_teacher_rules_out_do_no_harm(loss: Loss) -> None:
    draft, teacher = logits(17), logits(18)
    teacher[:, 2] = float("-inf")
    assert torch.isfinite(loss(draft, teacher, None)[0])
    assert torch.isfinite(gradient(loss, draft, teacher)).all()


def test_kl_equals_its_definition_and_its_analytic_gradient() -> None:
    draft, teacher = logits(21), logits(22)
    total, _ = LOSSES.get("kl")(draft, teacher, None)
    target = teacher.softmax(-1)
    assert torch.allclose(total, (target * (target.log() - draft.softmax(-1).log())).sum())
    assert torch.allclose(gradient(LOSSES.get("kl"), draft, teacher), draft.softmax(-1) - target)


def test_tv_equals_its_definition_and_autograd() -> None:
    draft, teacher = logits(23), logits(24)
    leaf = draft.clone().requires_grad_()
    written_out = 1 - torch.minimum(leaf.softmax(-1), teacher.softmax(-1)).sum(-1)
    (expected,) = torch.autograd.grad(written_out.sum(), leaf)
    assert torch.allclose(LOSSES.get("tv")(draft, teacher, None)[0], written_out.sum())
    assert torch.allclose(gradient(LOSSES.get("tv"), draft, teacher), expected)


def test_the_registry_holds_what_the_documents_name() -> None:
    expected = "acceptance ce jsd kl lk_alpha lk_lambda rkl tv tvdpp tvdpp_sampled"
    assert " ".join(LOSSES.names()) == expected


@pytest.mark.parametrize(
    ("name", "written_out"),
    [
        ("rkl", lambda d, t: (d * (d / t).log()).sum(-1)),
        ("jsd", lambda d, t: 0.5 * (t * (2 * t / (t + d)).log() + d * (2 * d / (t + d)).log()).sum(-1)),
        ("ce", lambda d, t: -(t * d.log()).sum(-1)),
        ("lk_alpha", lambda d, t: -torch.minimum(d, t).sum(-1).log()),
        ("acceptance", lambda d, t: 1 - torch.minimum(d, t).sum(-1)),
    ],
)
def test_a_loss_equals_its_definition_and_autograd(name: str, written_out) -> None:
    draft, teacher = logits(25), logits(26)
    leaf = draft.clone().requires_grad_()
    defined = written_out(leaf.softmax(-1), teacher.softmax(-1)).sum()
    (expected,) = torch.autograd.grad(defined, leaf)
    assert torch.allclose(LOSSES.get(name)(draft, teacher, None)[0], defined)
    assert torch.allclose(gradient(LOSSES.get(name), draft, teacher), expected)


def test_lk_lambda_equals_its_definition_with_lambda_held() -> None:
    draft, teacher = logits(27), logits(28)
    leaf = draft.clone().requires_grad_()
    ours, target = leaf.softmax(-1), teacher.softmax(-1)
    divergence, alpha = (target * (target / ours).log()).sum(-1), torch.minimum(ours, target).sum(-1)
    mixing = torch.exp(-3 * alpha).detach()
    defined = (mixing * divergence + (1 - mixing) * (1 - alpha)).sum()
    (expected,) = torch.autograd.grad(defined, leaf)
    assert torch.allclose(LOSSES.get("lk_lambda")(draft, teacher, None)[0], defined)
    assert torch.allclose(gradient(LOSSES.get("lk_lambda"), draft, teacher), expected)


def test_lk_alpha_is_finite_where_nothing_overlaps() -> None:
    draft, teacher = torch.zeros(2, D), torch.zeros(2, D)
    draft[:, 0], teacher[:, 1] = 300.0, 300.0
    total, _ = LOSSES.get("lk_alpha")(draft, teacher, None)
    found = gradient(LOSSES.get("lk_alpha"), draft, teacher)
    assert float(total) == pytest.approx(2 * (300 - math.log(D)))
    # All D tokens share the overlap of D * exp(-300), one of them is below its target; TV's own gradient is zero.
    assert torch.allclose(found[:, :2], torch.tensor([1 / D, -1 / D]).expand(2, 2), rtol=1e-4)
    assert not gradient(LOSSES.get("tv"), draft, teacher).any()


def policy_gradient(draft_ND: Tensor, advantage_ND: Tensor) -> Tensor:
    """-E_{x ~ draft}[advantage(x) * grad log draft(x)] with respect to the logits, row by row, [N, D]."""
    mean_N1 = (draft_ND * advantage_ND).sum(-1, keepdim=True)
    return draft_ND * (mean_N1 - advantage_ND)


def test_the_policy_gradient_of_the_plain_reward_is_the_gradient_of_tv() -> None:
    draft, teacher = logits(29), logits(30)
    leaf = draft.clone().requires_grad_()
    ours, target = leaf.softmax(-1), teacher.softmax(-1)
    (expected,) = torch.autograd.grad((0.5 * (ours - target).abs()).sum(), leaf)
    probs, reward = ours.detach(), (target > ours).double()
    assert torch.allclose(policy_gradient(probs, reward), expected)
    # A baseline, whichever it is for each row, changes nothing.
    assert torch.allclose(policy_gradient(probs, reward - torch.rand(N, 1, dtype=torch.float64)), expected)
    draws = 40_000
    many = probs.repeat(draws, 1)
    token = draw(many, torch.rand(len(many), dtype=torch.float64))
    earned = reward.repeat(draws, 1).gather(-1, token[:, None]).squeeze(-1)
    estimate = sampled_policy_gradient(many, token, earned).view(draws, N, D)
    spread = estimate.std(0) / draws**0.5
    assert ((estimate.mean(0) - expected).abs() < 5 * spread + 1e-12).all()


def test_tvdpp_is_tv_over_the_batch_standard_deviation_of_the_reward() -> None:
    draft, teacher = logits(31), logits(32)
    probs, target = draft.softmax(-1), teacher.softmax(-1)
    reward = (target > probs).double()
    mean = (probs * reward).sum() / N
    std = ((probs * (reward - mean) ** 2).sum() / N).sqrt()
    loss = LOSSES.get("tvdpp")
    assert torch.allclose(torch.stack(mean_and_std(loss.statistics(draft, teacher))), torch.stack([mean, std]))
    assert torch.allclose(gradient(loss, draft, teacher), gradient(LOSSES.get("tv"), draft, teacher) / std)
    normalised = policy_gradient(probs, (reward - mean) / std)
    assert torch.allclose(gradient(loss, draft, teacher), normalised)


def test_a_chain_is_one_minus_its_mean_accepted_share_with_its_gradient() -> None:
    loss, steps = LOSSES.get("acceptance"), 3
    length = torch.arange(N) % (steps + 1)  # some anchors have no step at all
    reached = torch.arange(steps) < length[:, None]
    weight = reached * torch.linspace(0.5, 1.5, N, dtype=torch.float64)[:, None]
    teacher = [logits(40 + j) for j in range(steps)]
    leaves = [logits(50 + j).requires_grad_() for j in range(steps)]
    alphas = [torch.minimum(d.softmax(-1), t.softmax(-1)).sum(-1) for d, t in zip(leaves, teacher, strict=True)]
    product, defined = torch.ones(N, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for step, alpha in enumerate(alphas):
        product = product * alpha
        defined = defined + (weight[:, step] * (1 - product)).sum()
    expected = torch.autograd.grad(defined, leaves)
    rows = [reached[:, j] for j in range(steps)]
    draft = [d[r] for d, r in zip(leaves, rows, strict=True)]
    total = loss.chain(draft, [t[r] for t, r in zip(teacher, rows, strict=True)], weight)
    assert torch.allclose(total, defined)
    for found, wanted in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        assert torch.allclose(found, wanted)
    # One full chain, as the paper writes it.
    one = [a[steps : steps + 1].detach() for a in alphas]
    share = torch.full((1, steps), 1 / steps, dtype=torch.float64)
    pairs = [(d[steps : steps + 1].detach(), t[steps : steps + 1]) for d, t in zip(leaves, teacher, strict=True)]
    paper = 1 - sum(torch.stack(one[: j + 1]).prod() for j in range(steps)) / steps
    assert torch.allclose(loss.chain(*map(list, zip(*pairs, strict=True)), share), paper)
