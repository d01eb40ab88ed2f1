"""From rows of the target's head to rows of the draft's: a linear map fitted where both are known.

The target's logit of a token is ``head_row . (w_t * x)``, x its final state scaled to unit mean square and w_t the
weight of its final norm; the draft's is ``row . (w_d * y)``. If y is x in the draft's space, y = A x with A nearly
orthogonal, the draft's row is that of the target, times w_t, through A, over w_d. Two maps are fitted on rows that
both heads have and compared on a part of these rows that is held out:

- ``norms`` (equal widths only): A is the identity up to one fitted scale; rows go over by the ratio of norm weights;
- ``ridge``: A is free, and shrunk towards that of ``norms`` (towards zero where the widths differ).

Embeddings have no norm behind them: the same maps with both weights 1.

Shape legend: D rows that both have, N other rows, F width of the target, H width of the draft.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.starts.leastsquares import Moments, fit

HELDOUT_SHARE = 0.125


@dataclass(frozen=True)
class RowMap:
    """A linear map of rows and what is known of it.

    ``errors``: share of the square of held-out draft rows that each kind of map leaves unexplained. ``step``: the
    slope of held-out draft rows on their images, above 1 where the map is too timid.
    """

    matrix_HF: Tensor
    kind: str
    errors: dict[str, float]
    step: float

    def __call__(self, rows_NF: Tensor) -> Tensor:
        """Draft rows [N, H] in float64 for rows [N, F] of the target, its norm's weight already multiplied in."""
        return rows_NF.double() @ self.matrix_HF.T


def fit_row_map(target_DF: Tensor, draft_DH: Tensor, draft_norm_H: Tensor | None = None, seed: int = 0) -> RowMap:
    """The better of both maps on held-out rows, fitted again on all.

    ``target_DF``: the target's rows times its norm's weight. ``draft_norm_H``: weight of the draft's norm, where one
    stands before the rows. Raises ``ValueError`` for fewer than 8 rows.
    """
    target, draft = target_DF.detach().double(), draft_DH.detach().to(target_DF.device).double()
    if len(target) < 8:
        raise ValueError(f"{len(target)} rows are too few to fit a map on")
    inverse = torch.ones(draft.shape[1]).to(draft) if draft_norm_H is None else _inverse(draft_norm_H.to(draft))
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(target), generator=generator).to(target.device)
    held = max(2, round(len(target) * HELDOUT_SHARE))
    out, kept = shuffled[:held], shuffled[held:]
    start = _start(target[kept], draft[kept], inverse)
    train, heldout = (_moments(target[part], draft[part], start) for part in (kept, out))
    found = fit(train, heldout)
    known = float(draft[out].square().sum()) or 1.0
    errors = {"ridge": found.error * float(heldout.square) / known}
    if target.shape[1] == draft.shape[1]:
        errors["norms"] = float(heldout.square) / known
    kind = min(errors, key=lambda name: errors[name])
    # The step is judged by a map that has not seen the rows it is judged on.
    trial = start + (train.solve(found.ratio) if kind == "ridge" and found.ratio is not None else 0)
    image = target[out] @ trial.T
    step = float((image * draft[out]).sum() / image.square().sum().clamp(min=1e-30))
    whole = _start(target, draft, inverse)
    if kind == "ridge" and found.ratio is not None:
        whole = whole + _moments(target, draft, whole).solve(found.ratio)
    return RowMap(whole, kind, errors, step)


def _inverse(weight_H: Tensor) -> Tensor:
    """1 over the weights; 0 for those that shut their channel, which no row can reach."""
    shut = weight_H.abs() < 1e-4 * weight_H.abs().max()
    return torch.where(shut, 0.0, 1 / torch.where(shut, 1.0, weight_H))


def _start(target_DF: Tensor, draft_DH: Tensor, inverse_H: Tensor) -> Tensor:
    """The map ``norms`` [H, F]: the inverse weights on the diagonal, times the scale of least squares."""
    if target_DF.shape[1] != draft_DH.shape[1]:
        return torch.zeros(draft_DH.shape[1], target_DF.shape[1]).to(target_DF)
    image = target_DF * inverse_H
    scale = (image * draft_DH).sum() / image.square().sum().clamp(min=1e-30)
    return torch.diag(inverse_H * scale)


def _moments(target_DF: Tensor, draft_DH: Tensor, start_HF: Tensor) -> Moments:
    moments = Moments(target_DF.shape[1], draft_DH.shape[1], target_DF.device)
    moments.add(target_DF, draft_DH - target_DF @ start_HF.T)
    return moments
