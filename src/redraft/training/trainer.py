"""Training a draft that reads the target's states: its batches in a reproducible order, its loss, its held-out tau; and
on-policy replay, which trains on the states that the present draft itself reaches in rounds that it loses.

Training-time test weighs every anchor and every draft step alike. Decoding does not visit them alike: rounds start
where the last one failed, and a late step is reached only by getting the earlier ones right. Replay walks the rounds
of the present draft over stored responses and weighs each state (anchor, step) by how often decoding reaches it in a
round that ends early.

No decoding is needed for that. Up to its first rejected token a round of a chain conditions on accepted tokens, and
those are the response's own; the draft's inputs are therefore the teacher-forced ones, and the walk over stored
responses visits the very states that decoding would (see :mod:`redraft.acceptance.simulate`). With v(m) the chance that
a round starts at anchor m, w_i the chance that its i-th token is accepted and R_j = w_1 ... w_j,

    reached(m, j) = v(m) (R_j - R_L)          in a round that ends early, given the text
    failed(m, j)  = v(m) (R_j - R_j+1)        and ends at this very step,

where L is the number of steps at which the draft can be right at all: a round stopped by the end of the response, or
by a token outside the draft's vocabulary, shows nothing that training could mend. Greedy rounds have w in {0, 1}, so
both are indicators; sampled rounds give expectations, which are exact.

Shape legend: A anchors of one response, J draft steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import FiniteFloat
from torch import Tensor

from redraft.acceptance.simulate import check_own, simulate_greedy_chain, tau_of, visits
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.drafts.walks import run_lengths
from redraft.errors import UserError
from redraft.features import FeatureSource
from redraft.progress import Progress
from redraft.rows import AnyRow, Span, anchor_batches, anchors, cut
from redraft.settings.sampler import Sampler
from redraft.settings.training import ReplayConfig, TrainConfig
from redraft.target import Head
from redraft.training.loop import OLD_DRAFT, Step, TrainingLoop, onward, rows_digest, stored_identity
from redraft.training.workers import SINGLE, Shares, Workers

# The entry of a run's identity that counts its pieces, where rows are cut.
SPANS = "spans"


@dataclass
class TrainResult:
    """The outcome. ``anchors`` counts supervised positions, those of the hook ahead of training included;
    ``history`` lists every evaluation as (step, held-out tau)."""

    best_tau: FiniteFloat
    start_tau: FiniteFloat
    steps: int
    anchors: int
    seconds: FiniteFloat
    stopped_early: bool
    history: list[tuple[int, FiniteFloat]]


def batch_order(rows: Sequence[AnyRow], config: TrainConfig, epoch: int) -> list[list[AnyRow]]:
    """The batches of an epoch, a function of seed and epoch: similar lengths together, batches shuffled."""
    order = random.Random(f"{config.seed}/{epoch}")
    shuffled = sorted((r for r in rows if anchors(r)), key=lambda r: r.key)
    order.shuffle(shuffled)
    pool = 16 * max(1, config.batch_anchors // max(1, sum(map(anchors, shuffled)) // max(1, len(shuffled))))
    pools = [shuffled[i : i + pool] for i in range(0, len(shuffled), pool)]
    batches = [batch for rows in pools for batch in anchor_batches(rows, config.batch_anchors)]
    order.shuffle(batches)
    return batches


def began_whole(folder: Path) -> bool:
    """Whether training in ``folder`` was begun without spans, by an older version or no row to cut; it goes on so."""
    try:
        known = stored_identity(folder)
    except UserError:  # damaged: whoever goes on with it says so
        return False
    return known is not None and SPANS not in known


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
        # What steps are made of: the rows, and of those that a step does not hold their spans.
        self.pieces: Sequence[Any] = self.rows
        if getattr(self.objective, "spans", False) and not began_whole(folder):
            self.pieces = cut(self.rows, config.batch_anchors)
        self.trained = [(n, p) for n, p in draft.named_parameters() if p.requires_grad]
        if any(p.dtype != torch.float32 for _, p in self.trained):
            raise ValueError("a draft is trained in float32; autocast sees to the rest")
        per_epoch = len(batch_order(self.pieces, config, 0))
        identity = {"rows": rows_digest([r.key for r in self.rows]), "draft": self.draft.config.to_dict()}
        identity |= {SPANS: len(self.pieces)} if self.cut_rows else {}
        self.loop = TrainingLoop(
            self.draft,
            self.trained,
            self.steps,
            max(1, round(config.epochs * per_epoch)),
            self.evaluate,
            config,
            folder,
            identity | {OLD_DRAFT: origin},
            # As the target decodes, so is its draft trained.
            precision="bfloat16" if target.dtype == torch.bfloat16 else "float32",
            before=partial(before, self) if before else None,
            workers=workers,
        )

    @property
    def cut_rows(self) -> int:
        """How many rows are trained in spans."""
        return len({piece.key for piece in self.pieces if isinstance(piece, Span)})

    def said_of_spans(self) -> str:
        """One line for a person; none where no row is cut."""
        if not (rows := self.cut_rows):
            return ""
        spans, step = len(self.pieces) - len(self.rows) + rows, self.config.batch_anchors
        return (
            f"{rows} of {len(self.rows)} rows have more than the {step:,} supervised positions of a step: they "
            f"are trained in {spans} spans, each with all the text in front of it; none is left out"
        )

    def evaluate(self) -> float:
        """tau_pooled of a greedy chain on the held-out rows."""
        accepted = simulate_greedy_chain(self.draft, self.target, self.heldout, self.store, self.config.gamma)
        return tau_of(accepted, self.heldout)

    def run(self, reporter: Progress | None = None) -> TrainResult:
        """Train to the end of the budget or until patience is out: :meth:`TrainingLoop.run`. Raises ``UserError``."""
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
        for rows in onward(partial(batch_order, self.pieces, self.config), begin):
            batch = self.objective.collate(self.shares.of(rows), self.store, self.weights)
            yield batch.to(self.target.device), sum(map(anchors, rows))


# -- replay ----------------------------------------------------------------------------------------------------------
@dataclass
class ReplayStates:
    """Weights [A, J] of the states of each row by its key, and what the walk met. Rounds are expectations."""

    weights: dict[str, Tensor]
    rounds: float
    lost_rounds: float

    def summary(self) -> str:
        """One line for a person."""
        share = self.lost_rounds / self.rounds if self.rounds else 0.0
        return f"{self.lost_rounds:,.0f} of {self.rounds:,.0f} rounds ended early ({share:.0%})"


@torch.no_grad()
def replay_states(
    draft: Draft,
    target: Head,
    rows: Sequence[Row],
    store: FeatureSource | None,
    gamma: int,
    config: ReplayConfig,
    greedy_drafts: bool = False,
    progress: Progress | None = None,
) -> ReplayStates:
    """Walk the rounds of a chain of ``gamma`` over responses of the target, each under its own sampler.

    Rows whose rounds all went through are left out of ``weights``. ``greedy_drafts``: the draft proposes its
    likeliest token also where the target samples. ``progress`` counts anchors. Raises ``UserError`` for reference
    answers, which decoding would not produce, and for a family that is not trained by unrolling.
    """
    check_replayable(draft)
    groups: dict[Sampler, list[Row]] = {}
    for row in rows:
        check_own(row)
        sampler = Sampler() if greedy_drafts else Sampler(row.temperature, row.top_k, row.top_p)
        groups.setdefault(sampler, []).append(row)
    found, done, walk = ReplayStates({}, 0.0, 0.0), 0, draft.walk(target)
    sayable = set(draft.vocabulary().tolist())
    for sampler, group in groups.items():
        for row, chances in walk.chances(group, store, gamma, sampler):
            chances_AJ = chances.double().numpy()
            # How far the draft can be right behind each anchor.
            steps_A = np.array(run_lengths([token in sayable for token in row.response_ids[1:]], gamma))
            reached_AJ, failed_AJ = lost_states(chances_AJ, steps_A)
            found.rounds += float(visits(chances_AJ).sum())
            found.lost_rounds += float(failed_AJ.sum())
            if failed_AJ.sum() > 0:
                inside_AJ = np.arange(gamma) < steps_A[:, None]
                weight_AJ = config.accepted * (reached_AJ - failed_AJ) + config.failed * failed_AJ
                found.weights[row.key] = torch.from_numpy(weight_AJ + config.floor * inside_AJ).float()
            done += anchors(row)
            if progress is not None:
                progress.update(done)
    return found


def lost_states(
    chances_AJ: npt.NDArray[np.float64], steps_A: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(reached, failed) [A, J] of one response: how often each state is met in a round that ends early, and how often
    the round ends there. ``steps_A`` is the number of steps at which the draft can be right behind each anchor.
    """
    count, gamma = chances_AJ.shape
    through = np.concatenate([np.ones((count, 1)), np.cumprod(chances_AJ, axis=1)], axis=1)
    passed = np.take_along_axis(through, steps_A[:, None], axis=1)
    inside = np.arange(gamma) < steps_A[:, None]
    starts = visits(chances_AJ)[:, None]
    reached = np.where(inside, starts * (through[:, :gamma] - passed), 0.0)
    failed = np.where(inside, starts * (through[:, :gamma] - through[:, 1:]), 0.0)
    return reached, failed


def check_replayable(draft: Draft) -> None:
    """Raise ``UserError`` for a draft of a family whose objective knows no states to weigh."""
    if not draft.weighable:
        raise UserError(f"replay is for drafts that train by unrolling; {draft.family} drafts do not")


def replay_settings(config: TrainConfig, replay: ReplayConfig) -> TrainConfig:
    """The settings of a pass: shorter, slower, and unrolled as far as a round can go."""
    rate = config.learning_rate * replay.rate
    return replace(config, epochs=replay.epochs, learning_rate=rate, unroll=config.gamma)
