"""A mixture of KL and total variation that leans on KL while acceptance is low.

    LK_lambda = lambda * KL(target || draft) + (1 - lambda) * TV(target, draft),    lambda = exp(-eta * alpha)

with alpha = 1 - TV and lambda held constant in the gradient, which is lambda * grad KL + (1 - lambda) * grad TV. Far
from the target KL gives a direction where TV's gradient vanishes; near it TV is what acceptance measures. Source: LK
losses (arXiv 2602.23881), eta 3.

Here alpha is each position's own; the authors' training code takes its mean over the batch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from redraft.losses.rows import Acceptance, ClosedForm, Gradient, log_probabilities, probabilities
from redraft.registries import LOSSES

ETA = 3.0


class LambdaMixture(ClosedForm):
    """The loss, and itself with the mixing weight held."""

    def hold(self, draft_logits_ND: Tensor, teacher_logits_ND: Tensor, weight_N: Tensor | None = None) -> partial:
        """The loss with lambda as it is at these logits."""
        found = Acceptance(*probabilities(draft_logits_ND, teacher_logits_ND))
        return partial(self, mixing_N=torch.exp(-ETA * found.alpha_N))


@LOSSES.register("lk_lambda")
@LambdaMixture
def lk_lambda(
    draft_logits_ND: Tensor, teacher_logits_ND: Tensor, mixing_N: Tensor | None = None
) -> tuple[Tensor, Gradient]:
    """LK_lambda of every position. ``mixing_N``: lambda, by default that of these logits."""
    log_draft_ND, log_target_ND = log_probabilities(draft_logits_ND, teacher_logits_ND)
    draft_ND, target_ND = log_draft_ND.exp(), log_target_ND.exp()
    found = Acceptance(draft_ND, target_ND)
    share_N = torch.exp(-ETA * found.alpha_N) if mixing_N is None else mixing_N
    terms_ND = log_target_ND.sub_(log_draft_ND).mul_(target_ND).masked_fill_(target_ND == 0, 0.0)
    loss_N = share_N * terms_ND.sum(-1).clamp_(min=0) + (1 - share_N) * (1 - found.alpha_N)

    def gradient() -> Tensor:
        # The gradient of TV is minus that of alpha.
        gradient_ND = found.gradient().mul_((share_N - 1)[:, None])
        return gradient_ND.add_(draft_ND.sub_(target_ND).mul_(share_N[:, None]))

    return loss_N, gradient
