"""How much of what was learned is put in: a trained draft drawn back towards the one that it began as.

Everything that training changed is scaled by one number: matrices, norms and head rows lie on the line from the old
values to the new ones (as in WiSE-FT, arXiv 2109.01903), a low-rank update through its outer factor, a private expert
through its output. Below one, less is won where it was trained and less is lost elsewhere, for the price of a merge;
docs/studies/guard.md has the exchange.

Shape legend: D draft vocabulary, H width.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from redraft.drafts.experts import is_private, refuse_unmergeable
from redraft.errors import UserError

Trained = TypeVar("Trained", bound=nn.Module)


@torch.no_grad()
def scale_change(draft: Trained, base: nn.Module, scale: float) -> Trained:
    """A copy of ``draft`` with ``scale`` times what sets it apart from ``base``, the draft that it was trained from.

    Head rows belong together by their tokens; a token that ``base`` cannot say keeps the row that it has.
    Raises ``UserError`` for a scale below 0 or not finite, drafts of different shapes, and routed experts.
    """
    if not 0 <= scale < math.inf:
        raise UserError(f"the scale is {scale}; give 1 for the whole change, less to draw the draft back, 0 or more")
    refuse_unmergeable(draft)
    scaled, before = copy.deepcopy(draft), dict(base.named_parameters())
    for name, parameter in scaled.named_parameters():
        if is_private(name):
            if name.endswith((".low_rank.outer", ".down_proj.weight")):
                parameter.mul_(scale)
            continue
        if name not in before:
            raise UserError(f"the base draft has no {name}, so there is nothing to draw it back to")
        old = before[name].detach().to(parameter.device)
        if name == "lm_head.weight" and getattr(draft, "reduced", False):
            old = _rows_of_tokens(parameter, draft, old, base)
        if old.shape != parameter.shape:
            raise UserError(f"{name} is {list(parameter.shape)} and in the base draft {list(old.shape)}")
        wide = old.float()
        parameter.copy_(wide + scale * (parameter.float() - wide))
    return scaled


def _rows_of_tokens(rows_DH: Tensor, draft: nn.Module, old_DH: Tensor, base: nn.Module) -> Tensor:
    """The base draft's head rows [D, H] in the order of this draft's vocabulary; its own row where there is none."""
    place = {int(token): row for row, token in enumerate(base.vocabulary())}  # type: ignore[operator]
    found = [place.get(int(token), -1) for token in draft.vocabulary()]  # type: ignore[operator]
    there = torch.tensor([row >= 0 for row in found], device=rows_DH.device)
    together_DH = rows_DH.clone()
    together_DH[there] = old_DH[torch.tensor([row for row in found if row >= 0], device=old_DH.device)].to(rows_DH)
    return together_DH
