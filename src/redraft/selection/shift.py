"""``shift``: how far fine-tuning moved the target's representation of a sample.

EDA (arXiv 2603.09527) keeps the samples whose representation moved most from the base target to the fine-tuned
one. Its exact distance is not public, so every choice is ours and named. With d = h_finetuned - h_base at one
``layer`` (``final``: behind the final norm; k: the residual stream after k decoder layers), the ``metric`` is

- ``mahalanobis``: distance of d from the mean of all d under their Ledoit-Wolf covariance, so that a direction in
  which everything moved alike counts for little (default);
- ``l2``: the length of d;
- ``cosine``: 1 - cos(h_finetuned, h_base);

and the ``pooling`` over the tokens of the response (of the prompt when there is no response)

- ``mean``, ``max``: of the tokens' distances;
- ``last``: the last token's distance alone, which has seen the whole text;
- ``state``: the distance of the mean states, one vector a row.

Each model sees each row once. ``l2`` and ``cosine`` keep nothing; ``mahalanobis`` keeps d in bfloat16 (2 * H bytes a
token, or a row for ``last`` and ``state``: 52 MB for 45,000 vectors of width 576), in memory up to ``memory_bytes``
and beyond that in a temporary file, and reads it three times more for mean, covariance and distances. The mean and
covariance are those of the very vectors that are measured.

Shape legend: T tokens of a row, P its vectors (T of them, or 1), N vectors of all rows, H hidden size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.errors import UserError
from redraft.files import allocate, require_free_space, scratch_folder
from redraft.registries import SCORERS
from redraft.rows import TokenRow
from redraft.selection import Scorer, ScoringContext, scored_tokens
from redraft.selection.states import FINAL, batched_states, check_layer, check_same_shape
from redraft.target import Target

METRICS = ("mahalanobis", "l2", "cosine")
POOLINGS = ("mean", "max", "last", "state")
CHUNK_TOKENS = 8192
# Keeps the covariance invertible when the data alone asks for no shrinkage, as when all vectors lie on one line.
LEAST_SHRINKAGE = 1e-6


@SCORERS.register("shift")
class Shift(Scorer):
    """Distance between the fine-tuned and the base target's states.

    Raises ``UserError`` for an unknown metric, pooling or layer.
    """

    name = "shift"
    needs = frozenset({"target", "base_target"})
    passes = 2

    def __init__(
        self,
        metric: str = "mahalanobis",
        layer: str | int = FINAL,
        pooling: str = "mean",
        memory_bytes: int = 512 * 2**20,
    ) -> None:
        if metric not in METRICS:
            raise UserError(f"unknown shift metric {metric!r}; choose one of: {', '.join(METRICS)}")
        if pooling not in POOLINGS:
            raise UserError(f"unknown shift pooling {pooling!r}; choose one of: {', '.join(POOLINGS)}")
        self.metric, self.layer, self.pooling = metric, check_layer(layer), pooling
        self.memory_bytes = memory_bytes

    @property
    def settings(self) -> dict[str, Any]:
        return {"metric": self.metric, "layer": self.layer, "pooling": self.pooling}

    def score(self, rows: Sequence[TokenRow], context: ScoringContext) -> list[float]:
        """One number a row. Raises ``UserError`` when the two targets or a row and a target do not fit."""
        target, base = context.target, context.base_target
        assert target is not None and base is not None  # in ``needs``
        check_same_shape(target, base, ("hidden_size", "layers"))
        if self.metric == "mahalanobis":
            return self._mahalanobis(rows, target, base, context)
        measure: Callable[[Tensor, Tensor], Tensor] = _l2 if self.metric == "l2" else _cosine
        scores = [0.0] * len(rows)
        for row, finetuned_PH, base_PH in self._pairs(rows, target, base, context):
            scores[row] = self._pooled(measure(finetuned_PH, base_PH))
        return scores

    def _pairs(
        self, rows: Sequence[TokenRow], target: Target, base: Target, context: ScoringContext
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(row index, fine-tuned vectors [P, H], base vectors [P, H]) in float32."""
        for row, start, states in batched_states(rows, (target, base), context, self.layer):
            finetuned_TH, base_TH = (states_TH[start:].float() for states_TH in states)
            if self.pooling == "last":
                yield row, finetuned_TH[-1:], base_TH[-1:]
            elif self.pooling == "state":
                yield row, finetuned_TH.mean(0, keepdim=True), base_TH.mean(0, keepdim=True)
            else:
                yield row, finetuned_TH, base_TH

    def _pooled(self, distance_P: Tensor) -> float:
        return float(distance_P.max() if self.pooling == "max" else distance_P.double().mean())

    def _mahalanobis(
        self, rows: Sequence[TokenRow], target: Target, base: Target, context: ScoringContext
    ) -> list[float]:
        sizes = [1 if self.pooling in ("last", "state") else scored_tokens(row) for row in rows]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        with _buffer(ends[-1], target.hidden_size, self.memory_bytes, context.scratch) as moved_NH:
            for row, finetuned_PH, base_PH in self._pairs(rows, target, base, context):
                moved_NH[ends[row] - sizes[row] : ends[row]] = (finetuned_PH - base_PH).to("cpu", torch.bfloat16)

            def chunks() -> Iterator[Tensor]:
                yield from moved_NH.split(CHUNK_TOKENS)

            shrunk = ledoit_wolf(chunks, context.device)
            distance_N = torch.cat(list(shrunk.distances(chunks()))).cpu()
        return [self._pooled(part_P) for part_P in distance_N.split(sizes)]


def _l2(finetuned_PH: Tensor, base_PH: Tensor) -> Tensor:
    return (finetuned_PH - base_PH).norm(dim=-1)


def _cosine(finetuned_PH: Tensor, base_PH: Tensor) -> Tensor:
    return 1 - torch.cosine_similarity(finetuned_PH.double(), base_PH.double(), dim=-1)


@contextmanager
def _buffer(tokens: int, width: int, memory_bytes: int, scratch: Path | None) -> Iterator[Tensor]:
    """A bfloat16 matrix [tokens, width], in memory or, beyond ``memory_bytes``, in a file that goes afterwards."""
    needed = 2 * tokens * width
    if needed <= memory_bytes:
        yield torch.empty(tokens, width, dtype=torch.bfloat16)
        return
    folder = scratch if scratch is not None else Path(tempfile.gettempdir())
    require_free_space(folder, needed)
    with scratch_folder(folder, "redraft-shift") as place:
        allocate(f"{place}/moved", needed)  # writing to a mapped file on a disk that is full ends the process
        flat = torch.from_file(f"{place}/moved", shared=True, size=tokens * width, dtype=torch.bfloat16)
        yield flat.view(tokens, width)


# -- the covariance ----------------------------------------------------------------------------------------------------
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
