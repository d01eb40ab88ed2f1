"""What all losses share: the computing precision, the weighted sum, and gradients that are known in closed form.

A loss through autograd keeps two or three matrices of positions x vocabulary until the backward pass. Where the
gradient has a closed form it is computed at once, and only that one matrix is kept, in the logits' own dtype
(which is the dtype that the gradient is handed on in anyway).

Shape legend: N positions, D draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def computing_dtype(*logits: Tensor) -> torch.dtype:
    """float64 when an input has it (gradient checks), else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


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


def with_gradient(draft_logits_ND: Tensor, loss_N: Tensor, gradient_ND: Tensor) -> Tensor:
    """``loss_N`` as a function of ``draft_logits_ND`` whose derivative, row by row, is ``gradient_ND``."""
    return _KnownGradient.apply(draft_logits_ND, loss_N, gradient_ND.to(draft_logits_ND.dtype))


def weighted_sum(loss_N: Tensor, weight_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum of weight * loss, sum of weights); without weights every position weighs 1."""
    if weight_N is None:
        return loss_N.sum(), loss_N.new_tensor(float(loss_N.shape[0]))
    weight_N = weight_N.to(loss_N.dtype)
    return (loss_N * weight_N).sum(), weight_N.sum()
