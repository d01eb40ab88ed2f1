"""``coverage``: what another scorer thinks of a sample, times how little of it is in the selection already.

Ranking each sample by itself fills a budget with near-duplicates of whatever scores highest: templates, rephrasings,
several answers to one prompt. Here samples are ranked one after another (:func:`greedy_order`), by the share
of samples that the base scorer puts no higher, weighed against the distance to the nearest one ranked before. The
number of a row is its value at its turn. So it depends on the other rows, not on their order or on the budget, and
the manifest names the rank that the base scorer would have given and the neighbour that held it back.

A sample stands for the mean of the target's states over its tokens, less the mean of all samples (states of language
models share a large common part, under which everything looks alike), at length 1. Wide states are first projected
onto ``WIDTH`` random directions, which keeps distances within some 10% (Johnson and Lindenstrauss 1984).

Memory 4 * ``WIDTH`` bytes a row; ranking 50,000 rows takes some 15 seconds of one core beside the two passes.

The order is greedy by quality times novelty:

    value(i | S) = quality_i ** (1 - diversity) * novelty(i | S) ** diversity,
    novelty(i | S) = half the distance from i to the nearest chosen vector, all vectors of length 1; 1 for empty S.

``diversity`` 1 is the farthest-first traversal of Gonzalez (Theoretical Computer Science 38, 1985), whose prefixes
cover all vectors within twice the best possible radius and which core-set selection uses (arXiv 1708.00489); 0 is the
order of quality. A value never grows as S does, so values fall along the greedy order, every prefix of which is the
greedy choice of its size: one order serves every budget.

Shape legend: N rows or vectors, P candidates in a pool, K chosen ones, T tokens of a row, H hidden size, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from redraft.errors import UserError
from redraft.registries import SCORERS
from redraft.rows import TokenRow
from redraft.selection import Scorer, ScoringContext, score_rows
from redraft.selection.states import FINAL, batched_states, check_layer
from redraft.settings.scorers import parse_scorer, scorer_text
from redraft.target import Target

Floats = npt.NDArray[np.floating]

WIDTH = 128
# Of the common part of all states: what differs less than this is rounding.
SOFTENING = 1e-3
# What is nearer than this counts as the same, so that rounding decides nothing between exact copies.
SAME = 1e-3
POOL = 1024
BLOCK = 8192


@SCORERS.register("coverage")
class Coverage(Scorer):
    """The base scorer's rank weighed against novelty: ``diversity`` 0 is the base scorer alone, 1 novelty alone.

    ``base`` is a scorer as :func:`redraft.selection.parse_scorer` reads it, ``layer`` where the states are taken from.
    Raises ``UserError`` for settings out of range.
    """

    name = "coverage"

    def __init__(self, base: str = "rejection", diversity: float = 0.5, layer: str | int = FINAL) -> None:
        self.base = parse_scorer(base)
        if isinstance(self.base, Coverage):
            raise UserError("coverage cannot be its own base; choose another scorer as base")
        if not 0 <= diversity <= 1:
            raise UserError(f"diversity must lie between 0 and 1, not {diversity}")
        self.diversity, self.layer = float(diversity), check_layer(layer)
        self.needs = self.base.needs | {"target"}
        self.passes = self.base.passes + 1

    @property
    def settings(self) -> dict[str, Any]:
        return {"base": scorer_text(self.base), "diversity": self.diversity, "layer": self.layer}

    def score(self, rows: Sequence[TokenRow], context: ScoringContext) -> list[float]:
        """One number a row; see :meth:`explained`."""
        return [score for score, _ in self.explained(rows, context)]

    def explained(self, rows: Sequence[TokenRow], context: ScoringContext) -> list[tuple[float, str]]:
        """(number, what made it) a row. Raises ``UserError`` as the base scorer does, and for rows not the target's."""
        assert context.target is not None  # in ``needs``
        by_key = sorted(range(len(rows)), key=lambda i: rows[i].key)
        ordered = [rows[i] for i in by_key]
        scores = score_rows(self.base, ordered, replace(context, progress=_part(context, len(rows), 0)))
        quality_N = shares(scores)
        vectors_ND = self._vectors(ordered, context.target, context)
        found: list[tuple[float, str]] = [(0.0, "")] * len(rows)
        for step in greedy_order(quality_N, vectors_ND, self.diversity):
            base = f"{self.base.name} {scores[step.index]:.4g} (quantile {quality_N[step.index]:.0%})"
            beside = "the first" if step.nearest is None else f"beside {ordered[step.nearest].key}"
            found[by_key[step.index]] = (step.value, f"{base}, novelty {step.distance:.3f}, {beside}")
        return found

    def _vectors(self, rows: Sequence[TokenRow], target: Target, context: ScoringContext) -> Floats:
        """Unit vectors [N, D] of the rows; a text that is there several times is run, and counted, once."""
        places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        place_N = [places.setdefault((tuple(r.prompt_ids), tuple(r.response_ids)), len(places)) for r in rows]
        first = {place: row for place, row in reversed(list(zip(place_N, rows, strict=True)))}
        unique = [first[place] for place in range(len(places))]
        project_HD = projection(target.hidden_size)
        vectors = torch.empty(len(unique), project_HD.shape[1])
        context = replace(context, progress=_part(context, len(rows), 1))
        for row, start, (states_TH,) in batched_states(unique, (target,), context, self.layer):
            vectors[row] = states_TH[start:].float().mean(0).cpu() @ project_HD
        return directions(vectors)[place_N].numpy()


def projection(width: int) -> Tensor:
    """[H, D]: the identity up to ``WIDTH``, beyond that fixed random directions that keep lengths on average."""
    if width <= WIDTH:
        return torch.eye(width)
    return torch.randn(width, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5


def directions(vectors_NH: Tensor) -> Tensor:
    """Vectors less their mean, with one small constant coordinate more, at length 1: [N, H + 1].

    The constant keeps vectors that are all equal equal; without it rounding would give them directions.
    """
    mean_H = vectors_NH.mean(0)
    constant_N1 = (SOFTENING * mean_H.norm().clamp(min=1e-6)).expand(len(vectors_NH), 1)
    return torch.nn.functional.normalize(torch.cat([vectors_NH - mean_H, constant_N1], 1), dim=1)


def shares(scores: Sequence[float]) -> Floats:
    """The share of all scores that each one is not below, equal ones sharing the mean of their ranks; in (0, 1].

    Scores are compared in four digits: what differs by rounding must not be ranked.
    """
    rounded = np.array([float(f"{score:.3e}") for score in scores])
    _, inverse, counts = np.unique(rounded, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - (counts - 1) / 2) / len(rounded))[inverse]


def _part(context: ScoringContext, rows: int, part: int) -> Callable[[int, int], None] | None:
    """Progress of the first or second of two passes, told as if the two were one over ``rows``."""
    report = context.progress
    if report is None:
        return None
    return lambda done, total: report((part * rows + done * rows // total) // 2, rows)


# -- greedy choice -----------------------------------------------------------------------------------------------------
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
