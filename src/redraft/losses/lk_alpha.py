"""Negative logarithm of acceptance: total variation whose gradient does not vanish where the draft is far off.

    LK_alpha = -log alpha,    alpha = sum_x min(target(x), draft(x)) = 1 - TV(target, draft)

Its gradient with respect to the draft's logits is that of TV divided by alpha. For a one-hot target it is
cross-entropy. Source: LK losses (arXiv 2602.23881). Computed from log probabilities throughout, so that rows that
overlap in no representable number still have a finite value and a gradient.

Here alpha is each position's own; the authors' training code takes the logarithm of its mean over the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redraft.losses.rows import ClosedForm, Gradient, log_probabilities
from redraft.registries import LOSSES


@LOSSES.register("lk_alpha")
@ClosedForm
def lk_alpha(draft_logits_ND: Tensor, teacher_logits_ND: Tensor) -> tuple[Tensor, Gradient]:
    """-log alpha of every position."""
    log_draft_ND, log_target_ND = log_probabilities(draft_logits_ND, teacher_logits_ND)
    log_alpha_N = torch.minimum(log_draft_ND, log_target_ND).logsumexp(-1)

    def gradient() -> Tensor:
        # Raising a token below its target's raises alpha. Its share of alpha is at most 1, however small both are.
        below_ND = log_draft_ND < log_target_ND
        share_ND = (log_draft_ND - log_alpha_N[:, None]).exp_().masked_fill_(~below_ND, 0.0)
        return log_draft_ND.exp_().mul_(share_ND.sum(-1, keepdim=True)).sub_(share_ND)

    return (-log_alpha_N).clamp_(min=0), gradient
