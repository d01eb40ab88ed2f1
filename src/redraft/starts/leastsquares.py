"""Ridge regression of a correction to a known matrix, from streamed samples.

    E = argmin sum_n w_n ||E x_n - r_n||^2 + lambda ||E||^2

With W = W_old + E and r = wanted - W_old x this is the regression that shrinks W towards W_old and not towards zero:
lambda to infinity leaves W_old as it is. Only sums are kept, in float64, never the samples. The strength is chosen
on samples that are held out, whose error follows from their sums alone, so that nothing is read twice.

From rows of the target's head to rows of the draft's: a linear map fitted where both are known.

The target's logit of a token is ``head_row . (w_t * x)``, x its final state scaled to unit mean square and w_t the
weight of its final norm; the draft's is ``row . (w_d * y)``. If y is x in the draft's space, y = A x with A nearly
orthogonal, the draft's row is that of the target, times w_t, through A, over w_d. Two maps are fitted on rows that
both heads have and compared on a part of these rows that is held out:

- ``norms`` (equal widths only): A is the identity up to one fitted scale; rows go over by the ratio of norm weights;
- ``ridge``: A is free, and shrunk towards that of ``norms`` (towards zero where the widths differ).

Embeddings have no norm behind them: the same maps with both weights 1.

Shape legend: N samples or rows, D rows that both heads have, F inputs or the target's width, H outputs or the draft's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Strengths that are tried, relative to the mean square of an input: lambda = ratio * trace(G) / F.
RATIOS = tuple(10.0**power for power in range(-7, 3))
# Of the rows that a map is fitted on.
HELDOUT_SHARE = 0.125


class Moments:
    """Sums over samples: sum w x x^T [F, F], sum w r x^T [H, F] and sum w ||r||^2, in float64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.gram_FF = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross_HF = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self.square = torch.zeros((), dtype=torch.float64, device=device)
        self.samples = 0

    def add(self, x_NF: Tensor, r_NH: Tensor, weight_N: Tensor | None = None) -> None:
        """Count samples in. Without ``weight_N`` all weigh the same."""
        x, r = x_NF.double(), r_NH.double()
        weighted = r if weight_N is None else r * weight_N.double()[:, None]
        self.gram_FF += x.T @ (x if weight_N is None else x * weight_N.double()[:, None])
        self.cross_HF += weighted.T @ x
        self.square += (weighted * r).sum()
        self.samples += len(x)

    def __add__(self, other: Moments) -> Moments:
        joined = Moments(self.gram_FF.shape[0], self.cross_HF.shape[0], self.gram_FF.device)
        joined.gram_FF, joined.cross_HF = self.gram_FF + other.gram_FF, self.cross_HF + other.cross_HF
        joined.square, joined.samples = self.square + other.square, self.samples + other.samples
        return joined

    def strength(self, ratio: float) -> float:
        """lambda of a strength relative to the mean square of an input."""
        return ratio * float(self.gram_FF.trace()) / len(self.gram_FF)

    def solve(self, ratio: float) -> Tensor:
        """E [H, F] at this relative strength, which must be positive."""
        regular = self.gram_FF + self.strength(ratio) * torch.eye(len(self.gram_FF)).to(self.gram_FF)
        factor, info = torch.linalg.cholesky_ex(regular)
        if int(info):  # a strength below rounding on a singular Gram matrix
            return torch.linalg.lstsq(regular, self.cross_HF.T).solution.T
        return torch.cholesky_solve(self.cross_HF.T, factor).T

    def error(self, correction_HF: Tensor) -> float:
        """sum w ||E x - r||^2 over the counted samples, as a share of sum w ||r||^2; 0 where both vanish."""
        quadratic = ((correction_HF @ self.gram_FF) * correction_HF).sum()
        left = self.square - 2 * (correction_HF * self.cross_HF).sum() + quadratic
        return float(left.clamp(min=0) / self.square) if float(self.square) else 0.0


@dataclass(frozen=True)
class Fit:
    """The chosen correction [H, F], fitted on all samples, and the held-out errors that chose it.

    ``ratio`` is None where no strength beat leaving the old matrix alone; the correction is then zero.
    ``errors`` maps every strength tried to its share of the held-out square that is left.
    """

    correction_HF: Tensor
    ratio: float | None
    errors: dict[float, float]

    @property
    def error(self) -> float:
        """Held-out share of the square that is left by the choice; 1 for no correction."""
        return 1.0 if self.ratio is None else self.errors[self.ratio]


def fit(train: Moments, heldout: Moments, ratios: tuple[float, ...] = RATIOS) -> Fit:
    """Choose the strength on ``heldout``, then solve on both parts together."""
    errors = {ratio: heldout.error(train.solve(ratio)) for ratio in ratios}
    best = min(errors, key=lambda ratio: errors[ratio])
    if not errors[best] < 1.0 or not float(heldout.square):
        return Fit(torch.zeros_like(train.cross_HF), None, errors)
    return Fit((train + heldout).solve(best), best, errors)


# -- rows of heads -----------------------------------------------------------------------------------------------------
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
