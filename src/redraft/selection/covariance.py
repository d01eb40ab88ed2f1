"""Shrinkage covariance of a stream of vectors, and distances under it.

Shape legend: N vectors, H their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Keeps the covariance invertible when the data alone asks for no shrinkage, as when all vectors lie on one line.
LEAST_SHRINKAGE = 1e-6


@dataclass(frozen=True)
class ShrunkCovariance:
    """(1 - shrinkage) * sample covariance + shrinkage * scale * identity, in float64."""

    mean_H: Tensor
    covariance_HH: Tensor
    shrinkage: float

    def distances(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Mahalanobis distances [N] of each chunk's vectors [N, H] from the mean; all zero when nothing varies."""
        if not self.covariance_HH.any():
            for chunk_NH in chunks:
                yield torch.zeros(len(chunk_NH), dtype=torch.float64, device=self.mean_H.device)
            return
        factor_HH = torch.linalg.cholesky(self.covariance_HH)
        for chunk_NH in chunks:
            centred_HN = (chunk_NH.to(self.mean_H) - self.mean_H).T
            yield torch.linalg.solve_triangular(factor_HH, centred_HN, upper=False).norm(dim=0)


def ledoit_wolf(chunks: Callable[[], Iterable[Tensor]], device: torch.device | str = "cpu") -> ShrunkCovariance:
    """Ledoit and Wolf's covariance (J. Multivariate Analysis 88, 2004) of all vectors of the chunks [N, H].

    Their lemmas 3.2 to 3.4 with n vectors x of width p, sample covariance S (divisor n), |A|^2 = trace(A A') / p:
    scale = trace(S) / p, d2 = |S - scale I|^2, b2 = min(d2, sum_x |x x' - S|^2 / n^2), shrinkage = b2 / d2. The sum
    needs no matrix per vector: sum_x |x x' - S|^2 = (sum_x |x|^4) / p - n |S|^2 with |x| the Euclidean norm.

    ``chunks`` is called twice and must give the same vectors; memory is one chunk and one H x H matrix.
    Raises ``ValueError`` for no vectors.
    """
    count, total_H = 0, None
    for chunk_NH in chunks():
        part_H = chunk_NH.to(device, torch.float64).sum(0)
        total_H = part_H if total_H is None else total_H + part_H
        count += len(chunk_NH)
    if total_H is None or not count:
        raise ValueError("a covariance needs at least one vector")
    mean_H = total_H / count
    width = len(mean_H)

    sample_HH, fourth = mean_H.new_zeros(width, width), 0.0
    for chunk_NH in chunks():
        centred_NH = chunk_NH.to(mean_H) - mean_H
        sample_HH.addmm_(centred_NH.T, centred_NH, alpha=1 / count)
        fourth += float(centred_NH.square().sum(1).square().sum())

    scale = float(sample_HH.trace()) / width
    size = float(sample_HH.square().sum()) / width
    spread = size - scale**2  # |S - scale I|^2, since trace(S I) = p * scale
    error = (fourth / width - count * size) / count**2
    shrinkage = 1.0 if spread <= 0 else min(max(error / spread, LEAST_SHRINKAGE), 1.0)
    shrunk_HH = sample_HH.mul_(1 - shrinkage)
    shrunk_HH.diagonal().add_(shrinkage * scale)
    return ShrunkCovariance(mean_H, shrunk_HH, shrinkage)
