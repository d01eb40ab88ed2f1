"""Forward Kullback-Leibler divergence, the loss of EAGLE-style training.

    KL(target || draft) = sum_x target(x) * (log target(x) - log draft(x))

Its gradient with respect to the draft's logits is draft(x) - target(x) (Hinton et al., arXiv 1503.02531, section
2.1). Used for drafts in EAGLE-3 (arXiv 2503.01840, as cross-entropy, which differs by the target's entropy, a
constant) and in EDA (arXiv 2603.09527).
"""

from __future__ import annotations

from torch import Tensor

from redraft.losses.rows import ClosedForm, Gradient, log_probabilities
from redraft.registries import LOSSES


@LOSSES.register("kl")
@ClosedForm
def kl(draft_logits_ND: Tensor, teacher_logits_ND: Tensor) -> tuple[Tensor, Gradient]:
    """KL(target || draft) of every position."""
    draft_ND, log_target_ND = log_probabilities(draft_logits_ND, teacher_logits_ND)
    target_ND = log_target_ND.exp()
    # Rounding can leave a divergence of equal rows just below zero. A token that the teacher rules out
    # (logit -inf) adds nothing, where 0 * inf would be nan.
    terms_ND = log_target_ND.sub_(draft_ND).mul_(target_ND).masked_fill_(target_ND == 0, 0.0)
    return terms_ND.sum(-1).clamp_(min=0), lambda: draft_ND.exp_().sub_(target_ND)
