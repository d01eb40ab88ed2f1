"""What all losses share: the computing precision, the weighted sum, and gradients that are known in closed form.

A loss through autograd keeps two or three matrices of positions x vocabulary until the backward pass. Where the
gradient has a closed form it is computed at once, and only that one matrix is kept, in the logits' own dtype
(which is the dtype that the gradient is handed on in anyway).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradient = Callable[[], Tensor]


def computing_dtype(*logits: Tensor) -> torch.dtype:
    """float64 when an input has it (gradient checks), else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def log_probabilities(*logits: Tensor) -> list[Tensor]:
    """Each in the precision of all."""
    dtype = computing_dtype(*logits)
    return [x.to(dtype).log_softmax(-1) for x in logits]


def probabilities(*logits: Tensor) -> list[Tensor]:
    """Each in the precision of all."""
    dtype = computing_dtype(*logits)
    return [x.to(dtype).softmax(-1) for x in logits]


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, draft_logits_ND: Tensor, loss_N: Tensor, gradient_ND: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_ND)
        return loss_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer_N: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * outer_N.unsqueeze(-1).to(gradient_ND.dtype), None, None


def with_gradient(draft_logits_ND: Tensor, loss_N: Tensor, gradient: Gradient) -> Tensor:
    """``loss_N`` as a function of ``draft_logits_ND`` whose derivative, row by row, is ``gradient()``."""
    if not draft_logits_ND.requires_grad:
        return loss_N
    with torch.no_grad():
        gradient_ND = gradient().to(draft_logits_ND.dtype)
    return _KnownGradient.apply(draft_logits_ND, loss_N, gradient_ND)


class ClosedForm:
    """A loss from a function of both logits that gives it row by row, and its gradient [N, D] to whoever asks."""

    def __init__(self, rows: Callable[..., tuple[Tensor, Gradient]]) -> None:
        self.rows = rows

    def __call__(
        self, draft_logits_ND: Tensor, teacher_logits_ND: Tensor, weight_N: Tensor | None = None, **held: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(sum, count) over positions; see ``redraft.losses`` for the contract. ``held`` is what a loss fixes."""
        with torch.no_grad():
            loss_N, gradient = self.rows(draft_logits_ND, teacher_logits_ND, **held)
        return weighted_sum(with_gradient(draft_logits_ND, loss_N, gradient), weight_N)


class Acceptance:
    """How far two rows of probabilities overlap, and which way each draft probability should go.

    ``distance_N`` is total variation, ``alpha_N`` is 1 minus that, and ``reward_N`` is the draft's mass on the tokens
    that the target makes likelier than the draft does: the expected reward of Goel et al. (arXiv 2403.00858).
    """

    def __init__(self, draft_ND: Tensor, target_ND: Tensor) -> None:
        """Of two matrices of probabilities, as :func:`probabilities` gives them."""
        self.draft_ND, self.target_ND = draft_ND, target_ND
        self.distance_N = (draft_ND - target_ND).abs_().sum(-1).mul_(0.5).clamp_(max=1)
        self.alpha_N = 1 - self.distance_N

    @property
    def reward_N(self) -> Tensor:
        return (self.draft_ND * (self.target_ND > self.draft_ND)).sum(-1)

    def gradient(self) -> Tensor:
        """Of alpha with respect to the draft's logits, [N, D]: only tokens below their target's share raise it."""
        rising_ND = self.draft_ND * (self.target_ND > self.draft_ND)
        return rising_ND - rising_ND.sum(-1, keepdim=True) * self.draft_ND


def weighted_sum(loss_N: Tensor, weight_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum of weight * loss, sum of weights); without weights every position weighs 1."""
    if weight_N is None:
        return loss_N.sum(), loss_N.new_tensor(float(loss_N.shape[0]))
    weight_N = weight_N.to(loss_N.dtype)
    return (loss_N * weight_N).sum(), weight_N.sum()
