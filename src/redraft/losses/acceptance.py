"""The share of a chain that is not accepted: training on what a round of decoding yields.

    L = 1 - (1 / gamma) * sum_j prod_(i <= j) alpha_i,    alpha_i = sum_x min(target_i(x), draft_i(x))

The product is the chance that sampled verification reaches and accepts step j, so that gamma * (1 - L) + 1 is the
expected length of a round. Unlike a sum of losses per step with decaying weights, a step counts for as much as the
steps before it let it be reached, and each step for what it lets follow:

    dL / d alpha_i = -(1 / gamma) * sum_(j >= i) prod_(k <= j, k != i) alpha_k

Source: Bebop (arXiv 2606.12370), its end-to-end total variation loss. A chain of one is 1 - alpha = TV.

L is the mean over steps j of 1 - prod_(i <= j) alpha_i. Where a chain is cut short (the text ends, or goes on with a
token outside the draft vocabulary) its own length takes gamma's place, and it weighs by that length in a batch: the
mean runs over pairs of an anchor and a step.

Shape legend: N anchors, D draft vocabulary, J draft steps, R anchors that reach a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redraft.losses.rows import Acceptance, computing_dtype, probabilities, weighted_sum, with_gradient
from redraft.registries import LOSSES


class ChainAcceptance:
    """The loss over chains; called as the other losses are, over chains of one."""

    def __call__(
        self, draft_logits_ND: Tensor, teacher_logits_ND: Tensor, weight_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(sum, count) of 1 - alpha over positions; see ``redraft.losses`` for the contract."""
        return weighted_sum(1 - acceptance_rate(draft_logits_ND, teacher_logits_ND), weight_N)

    def chain(self, draft_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], weight_NJ: Tensor) -> Tensor:
        """Weighted sum over anchors and steps j of 1 - prod_(i <= j) alpha_i.

        ``weight_NJ`` is above 0 where a step is reached, and no step is reached without the one before; the logits
        hold, step by step, the rows [R, D] of the anchors that reach it, in order.
        """
        dtype = computing_dtype(*draft_logits, *teacher_logits)
        product_N = torch.ones(len(weight_NJ), dtype=dtype, device=weight_NJ.device)
        total = product_N.new_zeros(())
        for draft_RD, teacher_RD, weight_N in zip(draft_logits, teacher_logits, weight_NJ.T, strict=True):
            index_R = weight_N.nonzero().squeeze(-1)
            product_R = product_N[index_R] * acceptance_rate(draft_RD, teacher_RD)
            total = total + (weight_N[index_R].to(dtype) * (1 - product_R)).sum()
            product_N = product_N.index_copy(0, index_R, product_R)
        return total


def acceptance_rate(draft_logits_ND: Tensor, teacher_logits_ND: Tensor) -> Tensor:
    """alpha [N] of every position, differentiable in the draft's logits; one matrix is kept for the gradient."""
    with torch.no_grad():
        found = Acceptance(*probabilities(draft_logits_ND, teacher_logits_ND))
    return with_gradient(draft_logits_ND, found.alpha_N, found.gradient)


LOSSES.register("acceptance")(ChainAcceptance())
