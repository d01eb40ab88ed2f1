"""Greedy choice by quality times novelty: what is good and unlike everything chosen before.

    value(i | S) = quality_i ** (1 - diversity) * novelty(i | S) ** diversity,
    novelty(i | S) = half the distance from i to the nearest chosen vector, all vectors of length 1; 1 for empty S.

``diversity`` 1 is the farthest-first traversal of Gonzalez (Theoretical Computer Science 38, 1985), whose prefixes
cover all vectors within twice the best possible radius and which core-set selection uses (arXiv 1708.00489); 0 is the
order of quality. A value never grows as S does, so values fall along the greedy order, every prefix of which is the
greedy choice of its size: one order serves every budget.

Shape legend: N vectors, P candidates in a pool, K chosen ones, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

# What is nearer than this counts as the same, so that rounding decides nothing between exact copies.
SAME = 1e-3
POOL = 1024
BLOCK = 8192


@dataclass(frozen=True)
class Chosen:
    """One step of the greedy order. ``nearest`` is the chosen vector nearest to ``index`` then, at ``distance`` in
    [0, 1]; ``None`` and 1 for the first."""

    index: int
    value: float
    nearest: int | None
    distance: float


def greedy_order(quality_N: Floats, vectors_ND: Floats, diversity: float, pool: int = POOL) -> list[Chosen]:
    """All N vectors, of length 1, in greedy order; of equal values, up to rounding, the lower index comes first.

    Exact, yet lazy: a value can only fall, so what is known of it from earlier is an upper bound. Only a pool of
    those with the highest bounds is brought up to date, and chosen from for as long as its best beats every bound
    outside. That turns N^2 distances into a few large matrix products, at most (N * D + POOL * BLOCK) floats in
    memory. ``quality_N`` must be positive.
    """
    search = _Search(quality_N, vectors_ND, diversity)
    while len(search.order) < len(quality_N):
        search.round(pool)
    return search.order


class _Search:
    """The state of :func:`greedy_order`. ``seen_N`` says how many of the chosen a row's bound knows of."""

    def __init__(self, quality_N: Floats, vectors_ND: Floats, diversity: float) -> None:
        count = len(quality_N)
        self.weight_N = np.asarray(quality_N, dtype=np.float64) ** (1 - diversity)
        self.vectors_ND, self.diversity = np.ascontiguousarray(vectors_ND), diversity
        self.bound_N = self.weight_N.copy()
        self.cosine_N = np.full(count, -np.inf)
        self.nearest_N = np.full(count, -1)
        self.seen_N = np.zeros(count, dtype=np.int64)
        self.open_N = np.arange(count)
        self.chosen_ND = np.empty_like(self.vectors_ND)
        self.order: list[Chosen] = []

    def round(self, size: int) -> None:
        """Bring the pool up to date and choose from it as long as that is sure to be the best of all."""
        ranked = self.open_N[np.argsort(-self.bound_N[self.open_N], kind="stable")[: size + 1]]
        pool_P = np.sort(ranked[:size])  # so that the first of equal values is the one of lowest index
        outside, beyond = (self.bound_N[ranked[size]], ranked[size]) if len(ranked) > size else (-np.inf, -1)
        self._refresh(pool_P)
        vectors_PD, value_P = self.vectors_ND[pool_P], self._values(pool_P)
        while True:
            best = int(value_P.argmax())
            if not (value_P[best] > outside or (value_P[best] == outside and pool_P[best] < beyond)):
                break
            self._choose(int(pool_P[best]), float(value_P[best]))
            self._approach(pool_P, vectors_PD @ vectors_PD[best], len(self.order) - 1)
            value_P = self._values(pool_P)
        self.bound_N[pool_P] = value_P
        self.seen_N[pool_P] = len(self.order)
        self.open_N = self.open_N[self.bound_N[self.open_N] > -np.inf]

    def _choose(self, index: int, value: float) -> None:
        nearest = int(self.nearest_N[index])
        first = nearest < 0
        step = Chosen(index, value, None if first else self.order[nearest].index, float(self._distance(index)))
        self.chosen_ND[len(self.order)] = self.vectors_ND[index]
        self.order.append(step)
        self.weight_N[index] = -np.inf

    def _refresh(self, pool_P: npt.NDArray[np.int64]) -> None:
        """Compare each row of the pool with what was chosen since it was last looked at."""
        for since in np.unique(self.seen_N[pool_P]):
            rows = pool_P[self.seen_N[pool_P] == since]
            for start in range(int(since), len(self.order), BLOCK):
                cosine_PK = self.vectors_ND[rows] @ self.chosen_ND[start : min(start + BLOCK, len(self.order))].T
                place_P = cosine_PK.argmax(1)
                self._approach(rows, cosine_PK[np.arange(len(rows)), place_P], place_P + start)

    def _approach(self, rows_P: npt.NDArray[np.int64], cosine_P: Floats, place_P: npt.NDArray[np.int64] | int) -> None:
        """Note where a vector just looked at, by its place in the order, is nearer than all before."""
        nearer_P = cosine_P > self.cosine_N[rows_P]
        self.nearest_N[rows_P] = np.where(nearer_P, place_P, self.nearest_N[rows_P])
        self.cosine_N[rows_P] = np.where(nearer_P, cosine_P, self.cosine_N[rows_P])

    def _distance(self, rows: npt.NDArray[np.int64] | int) -> npt.NDArray[np.float64]:
        """Half the distance to the nearest chosen one, 1 where nothing is chosen."""
        return np.sqrt(np.clip((1 - np.maximum(self.cosine_N[rows], -1.0)) / 2, 0.0, 1.0))

    def _values(self, rows_P: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return self.weight_N[rows_P] * np.maximum(self._distance(rows_P), SAME) ** self.diversity
