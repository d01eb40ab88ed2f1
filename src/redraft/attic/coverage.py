"""``coverage``: what another scorer thinks of a sample, times how little of it is in the selection already.

Ranking each sample by itself fills a budget with near-duplicates of whatever scores highest: templates, rephrasings,
several answers to one prompt. Here samples are ranked one after another (:func:`greedy_order`), by the share
of samples that the base scorer puts no higher, weighed against the distance to the nearest one ranked before. The
number of a row is its value at its turn. So it depends on the other rows, not on their order or on the budget, and
the manifest names the rank that the base scorer would have given and the neighbour that held it back.

A sample stands for the mean of the target's states over its tokens, less the mean of all samples (states of language
models share a large common part, under which everything looks alike), at length 1. Wide states are first projected
onto ``WIDTH`` random directions, which keeps distances within some 10% (Johnson and Lindenstrauss 1984).

Memory 4 * ``WIDTH`` bytes a row; ranking N rows takes N products of a vector with all of them: a second for 5,000, some
minutes for 50,000, of one core beside the two passes.

The order is greedy by quality times novelty:

    value(i | S) = quality_i ** (1 - diversity) * novelty(i | S) ** diversity,
    novelty(i | S) = half the distance from i to the nearest chosen vector, all vectors of length 1; 1 for empty S.

``diversity`` 1 is the farthest-first traversal of Gonzalez (Theoretical Computer Science 38, 1985), whose prefixes
cover all vectors within twice the best possible radius and which core-set selection uses (arXiv 1708.00489); 0 is the
order of quality. A value never grows as S does, so values fall along the greedy order, every prefix of which is the
greedy choice of its size: one order serves every budget.

Shape legend: N rows or vectors, T tokens of a row, H hidden size, D width.
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
from redraft.settings.texts import parse_scorer, scorer_text
from redraft.target import Target

Floats = npt.NDArray[np.floating]

WIDTH = 128
# Of the common part of all states: what differs less than this is rounding.
SOFTENING = 1e-3
# What is nearer than this counts as the same, so that rounding decides nothing between exact copies.
SAME = 1e-3


@SCORERS.register("coverage")
class Coverage(Scorer):
    """The base scorer's rank weighed against novelty: ``diversity`` 0 is the base scorer alone, 1 novelty alone.

    ``base`` is a scorer as :func:`redraft.settings.texts.parse_scorer` reads it, ``layer`` where the states are taken
    from. Raises ``UserError`` for settings out of range.
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


def greedy_order(quality_N: Floats, vectors_ND: Floats, diversity: float) -> list[Chosen]:
    """All N vectors, of length 1, in greedy order; of equal values the lower index comes first.

    ``quality_N`` must be positive.
    """
    weight_N = np.asarray(quality_N, dtype=np.float64) ** (1 - diversity)
    novelty_N, cosine_N = np.ones(len(weight_N)), np.full(len(weight_N), -np.inf)
    nearest_N = np.full(len(weight_N), -1)
    order: list[Chosen] = []
    while len(order) < len(weight_N):
        value_N = weight_N * np.maximum(novelty_N, SAME) ** diversity
        best = int(value_N.argmax())
        nearest = int(nearest_N[best]) if order else None
        order.append(Chosen(best, float(value_N[best]), nearest, float(novelty_N[best])))
        weight_N[best] = -np.inf
        # Whatever is nearer to what was just chosen than to all before has so much less that is new.
        seen_N = vectors_ND @ vectors_ND[best]
        nearer = seen_N > cosine_N
        cosine_N[nearer], nearest_N[nearer] = seen_N[nearer], best
        novelty_N[nearer] = np.sqrt(np.clip((1 - seen_N[nearer]) / 2, 0, 1))
    return order
