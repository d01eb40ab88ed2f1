"""What every registered loss must keep; a new loss inherits these tests by being registered.

Shape legend: N positions, D draft vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from redraft.losses import LOSSES, Loss

N, D = 12, 7


@pytest.fixture(params=LOSSES.names())
def loss(request: pytest.FixtureRequest) -> Loss:
    return LOSSES.get(request.param)


def logits(seed: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(N, D, generator=generator, dtype=torch.float64) * scale).to(dtype)


def gradient(loss: Loss, draft: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    draft = draft.clone().requires_grad_()
    total, _ = loss(draft, teacher, weight)
    (found,) = torch.autograd.grad(total, draft)
    return found


def test_equal_distributions_are_the_minimum(loss: Loss) -> None:
    teacher = logits(0)
    least, _ = loss(teacher + 3.0, teacher, None)  # a constant on the logits changes no distribution
    assert torch.allclose(gradient(loss, teacher, teacher), torch.zeros(N, D, dtype=torch.float64), atol=1e-12)
    for scale in (1e-3, 0.1, 3.0):
        assert loss(teacher + logits(1, scale=scale), teacher, None)[0] > least
    assert least == pytest.approx(0.0, abs=1e-12)


def test_never_negative(loss: Loss) -> None:
    for seed in range(20):
        for draft in (logits(seed), logits(seed, scale=60.0), logits(50 + seed) + 1e-7):
            total, _ = loss(draft.float(), logits(50 + seed).float(), None)
            assert torch.isfinite(total) and total >= 0


def test_gradient_equals_finite_differences(loss: Loss) -> None:
    teacher, weight = logits(1), torch.linspace(0.1, 2.0, N, dtype=torch.float64)
    draft = logits(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, weight)[0], (draft,), eps=1e-6, atol=1e-7)


def test_gradient_descent_reaches_the_teacher(loss: Loss) -> None:
    teacher, draft = logits(3, scale=1.0), logits(4, scale=1.0)
    start = loss(draft, teacher, None)[0]
    for _ in range(500):
        draft = draft - 0.3 * gradient(loss, draft, teacher)
    assert loss(draft, teacher, None)[0] < 0.2 * start


def test_sum_over_split_batches_equals_the_whole(loss: Loss) -> None:
    draft, teacher, weight = logits(5), logits(6), torch.rand(N, dtype=torch.float64)
    whole, count = loss(draft, teacher, weight)
    parts = [loss(draft[a:b], teacher[a:b], weight[a:b]) for a, b in ((0, 1), (1, 8), (8, N))]
    assert torch.allclose(sum(p[0] for p in parts), whole)
    assert torch.allclose(sum(p[1] for p in parts), count)
    assert torch.allclose(count, weight.sum())
    pieces = [gradient(loss, draft[a:b], teacher[a:b], weight[a:b]) for a, b in ((0, 5), (5, N))]
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
    found = gradient(loss, draft, teacher)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), gradient(loss, draft.double(), teacher.double()), atol=0, rtol=0.02)


def test_only_the_draft_gets_a_gradient(loss: Loss) -> None:
    draft, teacher = logits(13).requires_grad_(), logits(14).requires_grad_()
    loss(draft, teacher, None)[0].backward()
    assert draft.grad is not None and teacher.grad is None


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


def test_keeps_one_matrix_for_the_backward_pass(loss: Loss) -> None:
    kept: list[int] = []
    draft = logits(19, torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss(draft, logits(20, torch.float32), torch.ones(N))
    assert sum(size >= N * D for size in kept) <= 1


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
