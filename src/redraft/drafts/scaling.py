"""How much of what was learned is put in: a trained draft drawn back towards the one that it began as.

Everything that training changed is scaled by one number: matrices, norms and head rows lie on the line from the old
values to the new ones (as in WiSE-FT, arXiv 2109.01903), a low-rank update through its outer factor, a private expert
through its output. Below one, less is won where it was trained and less is lost elsewhere, for the price of a merge;
docs/studies/guard.md has the exchange.

And how finely it is told: a change of whole matrices, as ``full`` makes it, rounded to a few bits a weight
(:mod:`redraft.coarse`), makes a private part as small as low-rank updates are; docs/studies/coarse.md has what that
costs.

Shape legend: D draft vocabulary, H width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from redraft.coarse import Coarse, coarsen, placed, told
from redraft.drafts.base import AnyDraft, Draft
from redraft.drafts.experts import is_private, refuse_unmergeable
from redraft.errors import UserError


@torch.no_grad()
def scale_change(draft: AnyDraft, base: Draft, scale: float) -> AnyDraft:
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
        if name in draft.TOKEN_ROWS and draft.reduced:
            old = _rows_of_tokens(parameter, draft, old, base)
        if old.shape != parameter.shape:
            raise UserError(f"{name} is {list(parameter.shape)} and in the base draft {list(old.shape)}")
        wide = old.float()
        parameter.copy_(wide + scale * (parameter.float() - wide))
    return scaled


@torch.no_grad()
def coarse_change(draft: AnyDraft, base: Draft, names: Sequence[str], bits: int) -> tuple[AnyDraft, dict[str, Coarse]]:
    """A copy of ``draft``, in the type of ``base``, whose matrices among ``names`` are told in ``bits`` a weight.

    Also how they are told, for :func:`redraft.drafts.files.save_private`. Head rows belong together by their tokens,
    as in :func:`scale_change`; those of tokens that ``base`` cannot say, and all vectors, are kept whole. Raises
    ``UserError`` for drafts of different shapes.
    """
    known = dict(base.named_parameters())
    rounded = copy.deepcopy(draft).to(next(iter(known.values())).dtype)
    parts: dict[str, Coarse] = {}
    trained, places = dict(draft.named_parameters()), dict(rounded.named_parameters())
    for name in names:
        matrix = trained.get(name)
        if matrix is None or matrix.ndim != 2:
            continue
        by_tokens = name in draft.TOKEN_ROWS
        if name not in known or (not by_tokens and known[name].shape != matrix.shape):
            raise UserError(f"the base draft has no {name} of this shape, so there is no change of it to tell")
        source = _source(draft, base) if by_tokens and draft.reduced else None
        if torch.equal(placed(known[name], source)[_standing(source)], matrix.float().cpu()[_standing(source)]):
            continue  # new rows alone, which are told by themselves
        parts[name] = coarsen(matrix, known[name], bits, source)
        places[name].copy_(told(parts[name], known[name]))
    return rounded, parts


def _standing(source_D: Tensor | None) -> Tensor | slice:
    """The rows that stand in the base draft."""
    return slice(None) if source_D is None else source_D >= 0


def _source(draft: Draft, base: Draft) -> Tensor:
    """Where each of the draft's tokens stands in the base draft's vocabulary [D]; -1 for those that do not."""
    place = {int(token): row for row, token in enumerate(base.vocabulary())}
    return torch.tensor([place.get(int(token), -1) for token in draft.vocabulary()])


def _rows_of_tokens(rows_DH: Tensor, draft: Draft, old_DH: Tensor, base: Draft) -> Tensor:
    """The base draft's head rows [D, H] in the order of this draft's vocabulary; its own row where there is none."""
    source_D = _source(draft, base).to(rows_DH.device)
    there = source_D >= 0
    together_DH = rows_DH.clone()
    together_DH[there] = old_DH[source_D[there].to(old_DH.device)].to(rows_DH)
    return together_DH
