"""Ridge regression of a correction to a known matrix, from streamed samples.

    E = argmin sum_n w_n ||E x_n - r_n||^2 + lambda ||E||^2

With W = W_old + E and r = wanted - W_old x this is the regression that shrinks W towards W_old and not towards zero:
lambda to infinity leaves W_old as it is. Only sums are kept, in float64, never the samples. The strength is chosen
on samples that are held out, whose error follows from their sums alone, so that nothing is read twice.

Shape legend: N samples, F inputs, H outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Strengths that are tried, relative to the mean square of an input: lambda = ratio * trace(G) / F.
RATIOS = tuple(10.0**power for power in range(-7, 3))


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
