"""Training a draft that reads the target's states: its batches in a reproducible order, its loss, its held-out tau."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.acceptance.simulate import simulate_greedy_chain, tau_of
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.features import FeatureSource
from redraft.progress import Progress
from redraft.rows import anchor_batches, anchors
from redraft.settings.training import TrainConfig
from redraft.target import Head
from redraft.training.loop import OLD_DRAFT, Step, TrainingLoop, onward, rows_digest
from redraft.training.workers import SINGLE, Shares, Workers


@dataclass
class TrainResult:
    """The outcome. ``anchors`` counts supervised positions, those of the hook ahead of training included;
    ``history`` lists every evaluation as (step, held-out tau)."""

    best_tau: float
    start_tau: float
    steps: int
    anchors: int
    seconds: float
    stopped_early: bool
    history: list[tuple[int, float]]


def batch_order(rows: Sequence[Row], config: TrainConfig, epoch: int) -> list[list[Row]]:
    """The batches of an epoch, a function of seed and epoch: similar lengths together, batches shuffled."""
    order = random.Random(f"{config.seed}/{epoch}")
    shuffled = sorted((r for r in rows if anchors(r)), key=lambda r: r.key)
    order.shuffle(shuffled)
    pool = 16 * max(1, config.batch_anchors // max(1, sum(map(anchors, shuffled)) // max(1, len(shuffled))))
    pools = [shuffled[i : i + pool] for i in range(0, len(shuffled), pool)]
    batches = [batch for rows in pools for batch in anchor_batches(rows, config.batch_anchors)]
    order.shuffle(batches)
    return batches


class Trainer:
    """Trains the parameters that require a gradient; everything else of the draft stays as it is."""

    def __init__(
        self,
        draft: Draft,
        target: Head,
        store: FeatureSource,
        rows: Sequence[Row],
        heldout: Sequence[Row],
        config: TrainConfig,
        folder: Path,
        origin: str = "",
        *,
        before: Callable[[Trainer], int] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        workers: Workers = SINGLE,
    ) -> None:
        """``origin`` names what the draft was before, where its shape does not say it. ``before`` is done once, ahead
        of the first evaluation, and gives the supervised positions that it took. ``weights`` [anchors, draft steps]
        by row key weigh the states of a draft that is ``weighable``; rows without any are left out.

        Raises ``UserError`` when no row can be supervised or the folder belongs to another run.
        """
        self.draft, self.target, self.store, self.config = draft.to(target.device), target, store, config
        self.workers, self.shares, self.weights = workers, Shares(workers), weights
        if weights is not None and not weights:
            raise UserError("no round ended early, so there is nothing to replay")
        self.rows = [r for r in rows if anchors(r) and (weights is None or r.key in weights)]
        self.heldout = [r for r in heldout if anchors(r)]
        if not self.rows or not self.heldout:
            raise UserError("no row has two or more response tokens to train or to evaluate on; give longer responses")
        self.objective = draft.objective(target, config, self.shares.sum)
        self.trained = [(n, p) for n, p in draft.named_parameters() if p.requires_grad]
        if any(p.dtype != torch.float32 for _, p in self.trained):
            raise ValueError("a draft is trained in float32; autocast sees to the rest")
        per_epoch = len(batch_order(self.rows, config, 0))
        self.loop = TrainingLoop(
            self.draft,
            self.trained,
            self,
            max(1, round(config.epochs * per_epoch)),
            self.evaluate,
            config,
            folder,
            {"rows": rows_digest([r.key for r in self.rows]), "draft": self.draft.config.to_dict(), OLD_DRAFT: origin},
            # As the target decodes, so is its draft trained.
            precision="bfloat16" if target.dtype == torch.bfloat16 else "float32",
            before=partial(before, self) if before else None,
            workers=workers,
        )

    def evaluate(self) -> float:
        """tau_pooled of a greedy chain on the held-out rows."""
        accepted = simulate_greedy_chain(self.draft, self.target, self.heldout, self.store, self.config.gamma)
        return tau_of(accepted, self.heldout)

    def run(self, reporter: Progress | None = None) -> TrainResult:
        """Train to the end of the budget or until held-out tau has not risen for ``patience`` evaluations.

        On return the draft holds the weights of the best evaluation. A killed run, started again with the same
        arguments, ends with the same bits. Raises ``UserError`` when a loss or a gradient is not finite; the
        checkpoint before it stays.
        """
        r = self.loop.run(reporter)
        return TrainResult(r.best, r.start, r.steps, r.tokens, r.seconds, r.stopped_early, r.history)

    # -- steps -------------------------------------------------------------------------------------------------
    def steps(self, begin: int, position: dict[str, Any]) -> Iterator[Step]:
        """The optimiser steps from number ``begin`` on: each is one batch."""
        for batch, size in self.batches(begin):
            yield Step([partial(self.part, batch)], size)

    def part(self, batch: Any) -> Tensor:
        """The loss of this worker's batch, as it counts in the step."""
        return self.shares.loss(self.objective(batch))

    def batches(self, begin: int) -> Iterator[tuple[Any, int]]:
        """This worker's share of the batches of step ``begin`` and all later ones, collated, each with the supervised
        positions of the whole."""
        for rows in onward(partial(batch_order, self.rows, self.config), begin):
            batch = self.objective.collate(self.shares.of(rows), self.store, self.weights)
            yield batch.to(self.target.device), sum(map(anchors, rows))
