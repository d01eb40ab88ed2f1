"""Negative logarithm of acceptance: total variation whose gradient does not vanish where the draft is far off.

    LK_alpha = -log alpha,    alpha = sum_x min(target(x), draft(x)) = 1 - TV(target, draft)

Its gradient with respect to the draft's logits is that of TV divided by alpha. For a one-hot target it is
cross-entropy. Source: LK losses (arXiv 2602.23881). Computed from log probabilities throughout, so that rows that
overlap in no representable number still have a finite value and a gradient.

Here alpha is each position's own; the authors' training code takes the logarithm of its mean over the batch.

Shape legend: N positions, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redraft.losses.rows import computing_dtype, weighted_sum, with_gradient
from redraft.registries import LOSSES


@LOSSES.register("lk_alpha")
def lk_alpha(
    draft_logits_ND: Tensor, teacher_logits_ND: Tensor, weight_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum, count) of -log alpha over positions; see ``redraft.losses`` for the contract."""
    with torch.no_grad():
        dtype = computing_dtype(draft_logits_ND, teacher_logits_ND)
        log_draft_ND = draft_logits_ND.to(dtype).log_softmax(-1)
        log_target_ND = teacher_logits_ND.to(dtype).log_softmax(-1)
        log_alpha_N = torch.minimum(log_draft_ND, log_target_ND).logsumexp(-1)
        loss_N = (-log_alpha_N).clamp_(min=0)
        if not draft_logits_ND.requires_grad:
            return weighted_sum(loss_N, weight_N)
        # Raising a token below its target's raises alpha. Its share of alpha is at most 1, however small both are.
        below_ND = log_draft_ND < log_target_ND
        share_ND = (log_draft_ND - log_alpha_N[:, None]).exp_().masked_fill_(~below_ND, 0.0)
        gradient_ND = log_draft_ND.exp_().mul_(share_ND.sum(-1, keepdim=True)).sub_(share_ND)
    return weighted_sum(with_gradient(draft_logits_ND, loss_N, gradient_ND), weight_N)
