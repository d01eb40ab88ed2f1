"""Training a draft that reads the target's states: its batches in a reproducible order, its loss, its held-out tau."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from redraft.acceptance.simulate import anchor_batches, simulate_greedy_chain, tau_of
from redraft.acceptance.unroll import Batch, collate
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.features.store import FeatureStore, anchors
from redraft.progress import Progress
from redraft.registries import LOSSES
from redraft.target import Target
from redraft.train.aim import STEPS, aim_updates, settle, waiting
from redraft.train.checkpoint import rows_digest
from redraft.train.descent import Descent, DescentConfig, Step
from redraft.train.objective import Objective, make_objective


@dataclass(frozen=True)
class TrainConfig(DescentConfig):
    """How to train. ``batch_anchors`` counts supervised positions a step; ``unroll`` is EAGLE-3's J."""

    optimizer: str = "muon"
    loss: str = "kl"
    epochs: float = 3.0
    batch_anchors: int = 1536
    unroll: int = 3
    step_decay: float = 0.8
    gamma: int = 5

    def __post_init__(self) -> None:
        """Raises ``UserError`` for a setting that would train nothing, or without end."""
        super().__post_init__()
        LOSSES.get(self.loss)
        if not 0 < self.epochs < math.inf:
            raise UserError(f"training setting epochs must be above 0 and finite, not {self.epochs!r}")
        for name in ("batch_anchors", "unroll", "gamma"):
            if getattr(self, name) < 1:
                raise UserError(f"training setting {name} must be 1 or more, not {getattr(self, name)!r}")


@dataclass
class TrainResult:
    """The outcome. ``anchors`` counts supervised positions, those that low-rank updates were aimed by included;
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
        target: Target,
        store: FeatureStore,
        rows: Sequence[Row],
        heldout: Sequence[Row],
        config: TrainConfig,
        folder: Path,
        origin: str = "",
    ) -> None:
        """``origin`` names what the draft was before, where its shape does not say it.

        Raises ``UserError`` when no row can be supervised or the folder belongs to another run.
        """
        self.draft, self.target, self.store, self.config = draft.to(target.device), target, store, config
        self.rows = [r for r in rows if anchors(r)]
        self.heldout = [r for r in heldout if anchors(r)]
        if not self.rows or not self.heldout:
            raise UserError("no row has two or more response tokens to train or to evaluate on; give longer responses")
        self.objective = self.new_objective()
        self.trained = [(n, p) for n, p in draft.named_parameters() if p.requires_grad]
        if any(p.dtype != torch.float32 for _, p in self.trained):
            raise ValueError("a draft is trained in float32; autocast sees to the rest")
        per_epoch = len(batch_order(self.rows, config, 0))
        total = max(1, round(config.epochs * per_epoch))
        self.descent = Descent(
            self.draft,
            self.trained,
            self,
            total,
            self.evaluate,
            config,
            folder,
            {
                "rows": rows_digest([r.key for r in self.rows]),
                "draft": self.draft.config.to_dict(),
                "old draft": origin,
            },
            # As the target decodes, so is its draft trained.
            precision="bfloat16" if target.dtype == torch.bfloat16 else "float32",
            before=self.aim,
        )

    def new_objective(self) -> Objective:
        """What a step minimises: by default what the draft's family trains with."""
        return make_objective(self.draft, self.target, self.config)

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
        done = self.descent.run(reporter)
        settle(self.draft)
        return TrainResult(
            best_tau=done.best,
            start_tau=done.start,
            steps=done.steps,
            anchors=done.tokens,
            seconds=done.seconds,
            stopped_early=done.stopped_early,
            history=done.history,
        )

    def aim(self) -> int:
        """Turn new low-rank updates to where the gradient of the first steps is; the supervised positions it took."""
        if not waiting(self.draft):
            return 0
        seen: list[int] = []

        def backward() -> None:
            self.draft.train()
            for number, step in zip(range(min(STEPS, self.descent.total)), self.steps(0, {}), strict=False):
                for part in step.parts:
                    self.descent.loss(part, number).backward()
                seen.append(step.tokens)

        aim_updates(self.draft, backward)
        return sum(seen)

    # -- steps -------------------------------------------------------------------------------------------------
    def steps(self, begin: int, position: dict[str, Any]) -> Iterator[Step]:
        """The optimiser steps from number ``begin`` on: each is one batch."""
        for batch, size in self.batches(begin):
            yield Step([partial(self.objective, batch)], size)

    def batches(self, begin: int) -> Iterator[tuple[Batch, int]]:
        """The collated batches of step ``begin`` and all later ones, each with its supervised positions."""
        epoch, offset = 0, 0
        while True:
            order = batch_order(self.rows, self.config, epoch)
            for rows in order[max(0, begin - offset) :]:
                yield self.collated(rows).to(self.target.device), sum(map(anchors, rows))
            epoch, offset = epoch + 1, offset + len(order)

    def collated(self, rows: Sequence[Row]) -> Batch:
        """The batch of these rows, as the objective reads it."""
        return collate(rows, self.store, self.config.unroll)
