"""A mixture of KL and total variation that leans on KL while acceptance is low.

    LK_lambda = lambda * KL(target || draft) + (1 - lambda) * TV(target, draft),    lambda = exp(-eta * alpha)

with alpha = 1 - TV and lambda held constant in the gradient, which is lambda * grad KL + (1 - lambda) * grad TV. Far
from the target KL gives a direction where TV's gradient vanishes; near it TV is what acceptance measures. Source: LK
losses (arXiv 2602.23881), eta 3.

Here alpha is each position's own; the authors' training code takes its mean over the batch.

Shape legend: N positions, D draft vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from redraft.losses.rows import Acceptance, computing_dtype, weighted_sum, with_gradient
from redraft.registries import LOSSES

ETA = 3.0


class LambdaMixture:
    """The loss, and itself with the mixing weight held."""

    def __call__(
        self,
        draft_logits_ND: Tensor,
        teacher_logits_ND: Tensor,
        weight_N: Tensor | None = None,
        mixing_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(sum, count) over positions; see ``redraft.losses`` for the contract.

        ``mixing_N``: lambda, by default exp(-eta alpha) of these logits.
        """
        with torch.no_grad():
            dtype = computing_dtype(draft_logits_ND, teacher_logits_ND)
            log_draft_ND = draft_logits_ND.to(dtype).log_softmax(-1)
            log_target_ND = teacher_logits_ND.to(dtype).log_softmax(-1)
            draft_ND, target_ND = log_draft_ND.exp(), log_target_ND.exp()
            found = Acceptance(draft_ND, target_ND)
            if mixing_N is None:
                mixing_N = torch.exp(-ETA * found.alpha_N)
            terms_ND = log_target_ND.sub_(log_draft_ND).mul_(target_ND).masked_fill_(target_ND == 0, 0.0)
            loss_N = mixing_N * terms_ND.sum(-1).clamp_(min=0) + (1 - mixing_N) * (1 - found.alpha_N)
            if not draft_logits_ND.requires_grad:
                return weighted_sum(loss_N, weight_N)
            # The gradient of TV is minus that of alpha.
            gradient_ND = found.gradient().mul_((mixing_N - 1)[:, None])
            gradient_ND.add_(draft_ND.sub_(target_ND).mul_(mixing_N[:, None]))
        return weighted_sum(with_gradient(draft_logits_ND, loss_N, gradient_ND), weight_N)

    def hold(self, draft_logits_ND: Tensor, teacher_logits_ND: Tensor, weight_N: Tensor | None = None) -> partial:
        """The loss with lambda as it is at these logits."""
        dtype = computing_dtype(draft_logits_ND, teacher_logits_ND)
        found = Acceptance(draft_logits_ND.to(dtype).softmax(-1), teacher_logits_ND.to(dtype).softmax(-1))
        return partial(self, mixing_N=torch.exp(-ETA * found.alpha_N))


LOSSES.register("lk_lambda")(LambdaMixture())
