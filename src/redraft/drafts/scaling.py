"""How much of what was learned is put in: a trained draft drawn back towards the one that it began as.

Everything that training changed is scaled by one number: matrices, norms and head rows lie on the line from the old
values to the new ones (as in WiSE-FT, arXiv 2109.01903), a low-rank update through its outer factor, a private expert
through its output. Below one, less is won where it was trained and less is lost elsewhere, for the price of a merge;
docs/studies/guard.md has the exchange.

And how finely it is told: a change of whole matrices, as ``full`` makes it, is many small numbers of like size, which
low rank cannot hold and few bits can (BitDelta, arXiv 2402.10193, for the change of whole language models). A row's
change is rounded to 2^bits evenly spaced levels around zero, (code + 1/2 - 2^(bits - 1)) * step, with the step of least
squared error for the row; one bit is the sign times the row's mean magnitude. A private part is then as small as
low-rank updates are; docs/studies/coarse.md has what that costs.

Shape legend: D rows (of a head: the draft vocabulary), H columns, N rows that the known matrix does not have, B bytes
of a row's codes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redraft.drafts.base import AnyDraft, Draft, is_private
from redraft.errors import UserError
from redraft.settings.training import MOST_BITS


@torch.no_grad()
def scale_change(draft: AnyDraft, base: Draft, scale: float) -> AnyDraft:
    """A copy of ``draft`` with ``scale`` times what sets it apart from ``base``, the draft that it was trained from.

    Head rows belong together by their tokens; a token that ``base`` cannot say keeps the row that it has.
    Raises ``UserError`` for a scale below 0 or not finite, drafts of different shapes, and routed experts.
    """
    if not 0 <= scale < math.inf:
        raise UserError(f"the scale is {scale}; give 1 for the whole change, less to draw the draft back, 0 or more")
    draft.refuse_unmergeable()
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
            source_D = _source(draft, base).to(parameter.device)
            known = old[source_D.clamp(min=0)].to(parameter)
            old = torch.where((source_D >= 0)[:, None], known, parameter)
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
        standing = slice(None) if source is None else source >= 0
        if torch.equal(placed(known[name], source)[standing], matrix.float().cpu()[standing]):
            continue  # new rows alone, which are told by themselves
        parts[name] = coarsen(matrix, known[name], bits, source)
        places[name].copy_(told(parts[name], known[name]))
    return rounded, parts


def _source(draft: Draft, base: Draft) -> Tensor:
    """Where each of the draft's tokens stands in the base draft's vocabulary [D]; -1 for those that do not."""
    place = {int(token): row for row, token in enumerate(base.vocabulary())}
    return torch.tensor([place.get(int(token), -1) for token in draft.vocabulary()])


# -- changes of a few bits a weight ----------------------------------------------------------------------------------
# Steps that are tried, as shares of the one whose outermost levels reach the row's largest change.
SPANS = torch.linspace(0.3, 1.0, 15).tolist()


@dataclass
class Coarse:
    """Codes [D, B] (``bits`` each, packed row by row), steps [D], where each row stands in the known matrix [D] (-1:
    nowhere), and the rows that stand nowhere [N, H]. Without ``source`` every row stands in its own place."""

    bits: int
    columns: int
    codes: Tensor
    step: Tensor
    source: Tensor | None = None
    rows: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, by the last part of the name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def coarsen(matrix_DH: Tensor, known_DH: Tensor, bits: int, source_D: Tensor | None = None) -> Coarse:
    """``matrix`` as a quantised change of ``known``.

    Raises ``ValueError`` for bits that there are not and shapes that differ.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"{bits} bits; 1 to {MOST_BITS} are possible")
    matrix = matrix_DH.detach().float().cpu()
    known = placed(known_DH, source_D)
    if known.shape != matrix.shape:
        raise ValueError(f"a matrix {list(matrix.shape)} cannot be told by one of {list(known.shape)}")
    new = slice(0) if source_D is None else source_D.cpu() < 0
    change = matrix - known
    change[new] = 0.0
    step = _steps(change, bits)
    codes = _codes(change, step, bits)
    unpacked = np.unpackbits(codes.numpy()[..., None], axis=-1)[..., -bits:]
    packed = torch.from_numpy(np.packbits(unpacked.reshape(len(codes), -1), axis=1))
    if source_D is None:
        return Coarse(bits, matrix.shape[1], packed, step)
    # Rows that are kept whole take the type that the whole matrix would have been stored in.
    rows = matrix_DH.detach().cpu()[new].to(known_DH.dtype).contiguous()
    return Coarse(bits, matrix.shape[1], packed, step, source_D.cpu().to(torch.int32), rows)


def told(coarse: Coarse, known_DH: Tensor) -> Tensor:
    """The matrix [D, H] that was stored, in the type of ``known`` and on the CPU.

    Raises ``ValueError`` where the two do not fit.
    """
    known = placed(known_DH, coarse.source)
    width = -(-coarse.columns * coarse.bits // 8)
    fits = known.shape == (len(coarse.step), coarse.columns) and coarse.codes.shape == (len(coarse.step), width)
    new = None if coarse.source is None else coarse.source < 0
    if not fits or (new is not None and (coarse.rows is None or coarse.rows.shape != (int(new.sum()), known.shape[1]))):
        raise ValueError(f"codes {list(coarse.codes.shape)} do not fit a matrix {list(known.shape)}")
    unpacked = np.unpackbits(coarse.codes.numpy(), axis=1, count=coarse.columns * coarse.bits)
    # The codes' bits, the highest first, filled up to bytes.
    bits = unpacked.reshape(*known.shape, coarse.bits)
    filled = np.concatenate([np.zeros((*known.shape, 8 - coarse.bits), np.uint8), bits], -1)
    codes = torch.from_numpy(np.packbits(filled, axis=-1)[..., 0])
    matrix = (known + _levels(codes, coarse.step, coarse.bits)).to(known_DH.dtype)
    if new is not None and coarse.rows is not None:
        matrix[new] = coarse.rows.to(matrix.dtype)
    return matrix


def placed(known_DH: Tensor, source_D: Tensor | None) -> Tensor:
    """The known rows in the places of the matrix, in float32 on the CPU; any row where there is none.

    They are taken as they are served, in bfloat16, whatever type they came in: the same codes then tell the same.
    """
    known = known_DH.detach().to(torch.bfloat16).float().cpu()
    return known if source_D is None else known[source_D.cpu().long().clamp(min=0)]


def _levels(codes: Tensor, step_D: Tensor, bits: int) -> Tensor:
    return (codes.float() + 0.5 - 2 ** (bits - 1)) * step_D[:, None]


def _codes(change_DH: Tensor, step_D: Tensor, bits: int) -> Tensor:
    """The nearest level's number [D, H]."""
    step = torch.where(step_D > 0, step_D, 1.0)[:, None]
    return (change_DH / step + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1).to(torch.uint8)


def _steps(change_DH: Tensor, bits: int) -> Tensor:
    if bits == 1:
        return 2 * change_DH.abs().mean(1)
    reach_D = 2 * change_DH.abs().amax(1) / (2**bits - 1)
    best_D = reach_D.clone()
    least_D = torch.full_like(reach_D, torch.inf)
    for span in SPANS:
        step_D = span * reach_D
        error_D = (_levels(_codes(change_DH, step_D, bits), step_D, bits) - change_DH).square().sum(1)
        best_D = torch.where(error_D < least_D, step_D, best_D)
        least_D = torch.minimum(error_D, least_D)
    return best_D
