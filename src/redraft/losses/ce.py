"""Soft cross-entropy, the loss as EAGLE states it.

    CE(target, draft) = -sum_x target(x) * log draft(x) = KL(target || draft) + H(target)

Its gradient with respect to the draft's logits is draft(x) - target(x), forward KL's own; only the value differs, by
the target's entropy, which no draft can change. So a run with ``ce`` takes the steps of a run with ``kl``, and its
loss compares with the figures that EAGLE trainers print (EAGLE, arXiv 2401.15077; EAGLE-3, arXiv 2503.01840).
"""

from __future__ import annotations

from torch import Tensor

from redraft.losses.rows import ClosedForm, Gradient, log_probabilities, probabilities
from redraft.registries import LOSSES


class CrossEntropy(ClosedForm):
    """The loss, and its least value beside it."""

    def least(self, teacher_logits_ND: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """The summed entropy of the teacher, which the loss is when the draft equals it."""
        return self(teacher_logits_ND.detach(), teacher_logits_ND, weight_N)[0]


@LOSSES.register("ce")
@CrossEntropy
def cross_entropy(draft_logits_ND: Tensor, teacher_logits_ND: Tensor) -> tuple[Tensor, Gradient]:
    """-sum_x target(x) * log draft(x) of every position."""
    (log_draft_ND,), (target_ND,) = log_probabilities(draft_logits_ND), probabilities(teacher_logits_ND)
    # A token that both rule out adds nothing, where 0 * inf would be nan.
    loss_N = -(log_draft_ND * target_ND).masked_fill_(target_ND == 0, 0.0).sum(-1)
    return loss_N, lambda: log_draft_ND.exp_().sub_(target_ND)
