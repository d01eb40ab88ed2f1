"""Reverse Kullback-Leibler divergence: the draft is punished for saying what the target would not.

    KL(draft || target) = sum_x draft(x) * (log draft(x) - log target(x))

Its gradient with respect to the draft's logits is draft(x) * (log draft(x) - log target(x) - KL). It seeks a mode
where forward KL covers all of them (Gu et al., MiniLLM, arXiv 2306.08543, section 2).
"""

from __future__ import annotations

from torch import Tensor

from redraft.losses.rows import ClosedForm, Gradient, log_probabilities
from redraft.registries import LOSSES

# A token that the teacher rules out would make the divergence infinite; no float32 softmax of use goes below this.
LEAST_LOG_PROBABILITY = -100.0


@LOSSES.register("rkl")
@ClosedForm
def rkl(draft_logits_ND: Tensor, teacher_logits_ND: Tensor) -> tuple[Tensor, Gradient]:
    """KL(draft || target) of every position.

    The target's log probabilities are bounded below at ``LEAST_LOG_PROBABILITY`` where the draft's are above that.
    """
    log_draft_ND, log_target_ND = log_probabilities(draft_logits_ND, teacher_logits_ND)
    draft_ND = log_draft_ND.exp()
    # Where the draft is as sure as the bound itself that a token is out, it does not matter; bounding the draft
    # too keeps two equal rows at exactly zero.
    ratio_ND = log_draft_ND.clamp_(min=LEAST_LOG_PROBABILITY).sub_(log_target_ND.clamp_(min=LEAST_LOG_PROBABILITY))
    loss_N = (draft_ND * ratio_ND).sum(-1)
    return loss_N.clamp(min=0), lambda: ratio_ND.sub_(loss_N[:, None]).mul_(draft_ND)
