"""Jensen-Shannon divergence: between forward and reverse KL, symmetric and never above log 2.

    JSD = 0.5 * KL(target || mean) + 0.5 * KL(draft || mean),    mean(x) = 0.5 * (target(x) + draft(x))

With g(x) = 0.5 * log(draft(x) / mean(x)) its gradient with respect to the draft's logits is
draft(x) * (g(x) - sum_y draft(y) g(y)). As a distillation loss: Agarwal et al., generalised knowledge distillation
(arXiv 2306.13649), with their beta at one half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from redraft.losses.rows import ClosedForm, Gradient, log_probabilities
from redraft.registries import LOSSES


@LOSSES.register("jsd")
@ClosedForm
def jsd(draft_logits_ND: Tensor, teacher_logits_ND: Tensor) -> tuple[Tensor, Gradient]:
    """JSD(target, draft) of every position."""
    log_draft_ND, log_target_ND = log_probabilities(draft_logits_ND, teacher_logits_ND)
    log_mean_ND = torch.logaddexp(log_draft_ND, log_target_ND).sub_(math.log(2.0))
    target_ND = log_target_ND.exp()
    # A token that the teacher rules out adds nothing on its side, where 0 * inf would be nan.
    towards_N = log_target_ND.sub_(log_mean_ND).mul_(target_ND).masked_fill_(target_ND == 0, 0.0).sum(-1)
    half_ND = log_mean_ND.neg_().add_(log_draft_ND).mul_(0.5)
    draft_ND = log_draft_ND.exp_()
    mean_N = (draft_ND * half_ND).sum(-1)
    loss_N = (0.5 * towards_N + mean_N).clamp_(min=0)
    return loss_N, lambda: half_ND.sub_(mean_N[:, None]).mul_(draft_ND)
