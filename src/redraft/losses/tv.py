"""Total variation distance: what acceptance itself measures.

    TV(target, draft) = 0.5 * sum_x |target(x) - draft(x)| = 1 - sum_x min(target(x), draft(x))

so that 1 - TV is the chance that a sampled draft token is accepted (arXiv 2211.17192, theorem 3.5). With
r(x) = 1[target(x) > draft(x)] its gradient with respect to the draft's logits is
draft(x) * (sum_y draft(y) r(y) - r(x)). As a training loss: Goel et al. (arXiv 2403.00858), who note that
its gradient vanishes where the draft is far off, so it serves better to finish than to start.
"""

from __future__ import annotations

from torch import Tensor

from redraft.losses.rows import Acceptance, ClosedForm, Gradient, probabilities
from redraft.registries import LOSSES


@LOSSES.register("tv")
@ClosedForm
def tv(draft_logits_ND: Tensor, teacher_logits_ND: Tensor) -> tuple[Tensor, Gradient]:
    """TV(target, draft) of every position."""
    found = Acceptance(*probabilities(draft_logits_ND, teacher_logits_ND))
    return found.distance_N, lambda: found.gradient().neg_()
