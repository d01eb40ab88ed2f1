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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import require_free_space
from redraft.errors import UserError
from redraft.registries import SCORERS
from redraft.selection import ScorableRow, ScoringContext, scored_tokens
from redraft.selection.covariance import ledoit_wolf
from redraft.selection.states import FINAL, batched_states, check_layer
from redraft.target import Target

METRICS = ("mahalanobis", "l2", "cosine")
POOLINGS = ("mean", "max", "last", "state")
CHUNK_TOKENS = 8192


@SCORERS.register("shift")
class Shift:
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

    def score(self, rows: Sequence[ScorableRow], context: ScoringContext) -> list[float]:
        """One number a row. Raises ``UserError`` when the two targets or a row and a target do not fit."""
        target, base = context.target, context.base_target
        assert target is not None and base is not None  # in ``needs``
        check_pair(target, base)
        if self.metric == "mahalanobis":
            return self._mahalanobis(rows, target, base, context)
        measure: Callable[[Tensor, Tensor], Tensor] = _l2 if self.metric == "l2" else _cosine
        scores = [0.0] * len(rows)
        for row, finetuned_PH, base_PH in self._pairs(rows, target, base, context):
            scores[row] = self._pooled(measure(finetuned_PH, base_PH))
        return scores

    def _pairs(
        self, rows: Sequence[ScorableRow], target: Target, base: Target, context: ScoringContext
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
        self, rows: Sequence[ScorableRow], target: Target, base: Target, context: ScoringContext
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


def check_pair(target: Target, base: Target) -> None:
    """Raise ``UserError`` unless the states of both models at one layer can be subtracted."""
    for what, ours, theirs in (
        ("hidden size", target.hidden_size, base.hidden_size),
        ("layer count", target.layers, base.layers),
    ):
        if ours != theirs:
            raise UserError(
                f"the target has {what} {ours} and the base target {theirs}; "
                "shift compares a fine-tuned model with the model it was fine-tuned from"
            )


@contextmanager
def _buffer(tokens: int, width: int, memory_bytes: int, scratch: Path | None) -> Iterator[Tensor]:
    """A bfloat16 matrix [tokens, width], in memory or, beyond ``memory_bytes``, in a file that goes afterwards."""
    needed = 2 * tokens * width
    if needed <= memory_bytes:
        yield torch.empty(tokens, width, dtype=torch.bfloat16)
        return
    folder = scratch if scratch is not None else Path(tempfile.gettempdir())
    require_free_space(folder, needed)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="redraft-shift-", dir=folder) as place:
        flat = torch.from_file(f"{place}/moved", shared=True, size=tokens * width, dtype=torch.bfloat16)
        yield flat.view(tokens, width)
