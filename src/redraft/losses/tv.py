"""Total variation distance: what acceptance itself measures.

    TV(target, draft) = 0.5 * sum_x |target(x) - draft(x)| = 1 - sum_x min(target(x), draft(x))

so that 1 - TV is the chance that a sampled draft token is accepted (arXiv 2211.17192, theorem 3.5). With
r(x) = 1[target(x) > draft(x)] its gradient with respect to the draft's logits is
draft(x) * (sum_y draft(y) r(y) - r(x)). As a training loss: Goel et al. (arXiv 2403.00858), who note that
its gradient vanishes where the draft is far off, so it serves better to finish than to start.

Shape legend: N positions, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redraft.losses.rows import Acceptance, computing_dtype, weighted_sum, with_gradient
from redraft.registries import LOSSES


@LOSSES.register("tv")
def tv(draft_logits_ND: Tensor, teacher_logits_ND: Tensor, weight_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, count) of TV(target, draft) over positions; see ``redraft.losses`` for the contract."""
    with torch.no_grad():
        dtype = computing_dtype(draft_logits_ND, teacher_logits_ND)
        found = Acceptance(draft_logits_ND.to(dtype).softmax(-1), teacher_logits_ND.to(dtype).softmax(-1))
        if not draft_logits_ND.requires_grad:
            return weighted_sum(found.distance_N, weight_N)
        gradient_ND = found.gradient().neg_()
    return weighted_sum(with_gradient(draft_logits_ND, found.distance_N, gradient_ND), weight_N)
