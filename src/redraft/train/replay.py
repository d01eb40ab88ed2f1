"""On-policy replay: train on the states that the present draft itself reaches in rounds that it loses.

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

Shape legend: M packed anchors, A anchors of one response, J draft steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from redraft.acceptance.simulate import acceptance_given_text, check_own, matches, visits
from redraft.acceptance.unroll import Batch, collate, supervised
from redraft.data.store import Row
from redraft.errors import UserError
from redraft.features import FeatureSource
from redraft.progress import Progress
from redraft.rows import anchor_batches, anchors
from redraft.settings.sampler import Sampler
from redraft.settings.training import ReplayConfig, TrainConfig
from redraft.target import Head
from redraft.train.objective import Objective, UnrollObjective, with_extra_loss
from redraft.train.trainer import Trainer


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
    draft: Any,
    target: Head,
    rows: Sequence[Row],
    store: FeatureSource,
    gamma: int,
    config: ReplayConfig,
    batch_anchors: int = 1024,
    greedy_drafts: bool = False,
    progress: Progress | None = None,
) -> ReplayStates:
    """Walk the rounds of a chain of ``gamma`` over responses of the target, each under its own sampler.

    Rows whose rounds all went through are left out of ``weights``. ``greedy_drafts``: the draft proposes its
    likeliest token also where the target samples. ``progress`` counts anchors. Raises ``UserError`` for reference
    answers, which decoding would not produce.
    """
    for row in rows:
        check_own(row)
    groups: dict[Sampler, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.key):
        sampler = Sampler() if greedy_drafts else Sampler(row.temperature, row.top_k, row.top_p)
        groups.setdefault(sampler, []).append(row)
    found, done = ReplayStates({}, 0.0, 0.0), 0
    for sampler, group in groups.items():
        for part in anchor_batches(group, batch_anchors):
            _walk(draft, target, part, collate(part, store, gamma).to(target.device), gamma, sampler, config, found)
            done += sum(map(anchors, part))
            if progress is not None:
                progress.update(done)
    return found


def _walk(
    draft: Any,
    target: Head,
    rows: Sequence[Row],
    batch: Batch,
    gamma: int,
    sampler: Sampler,
    config: ReplayConfig,
    found: ReplayStates,
) -> None:
    """Add the rows of one batch to ``found``."""
    counts = [anchors(row) for row in rows]
    steps_M = supervised(draft, batch).sum(-1).cpu().split(counts)
    chances_MJ = acceptance_chances(draft, target, batch, gamma, sampler).cpu().split(counts)
    for row, chances, steps in zip(rows, chances_MJ, steps_M, strict=True):
        reached, failed = lost_states(chances.double().numpy(), steps.numpy())
        sayable = np.arange(gamma) < steps.numpy()[:, None]
        weight = config.accepted * (reached - failed) + config.failed * failed + config.floor * sayable
        found.rounds += float(visits(chances.double().numpy()).sum())
        found.lost_rounds += float(failed.sum())
        if failed.sum() > 0:
            found.weights[row.key] = torch.from_numpy(weight).float()


def acceptance_chances(draft: Any, target: Head, batch: Batch, gamma: int, sampler: Sampler) -> Tensor:
    """w [M, J]: the chance that the j-th token behind each anchor comes by acceptance, given the text.

    Greedy chains have 1 up to the first wrong proposal and 0 behind it.
    """
    if not sampler.greedy:
        return acceptance_given_text(draft, target, batch, gamma, sampler)
    with torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype == torch.bfloat16):
        runs_M = matches(draft, target, batch, gamma)
    return (torch.arange(gamma, device=runs_M.device) < runs_M.unsqueeze(-1)).float()


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


def check_replayable(draft: Any) -> None:
    """Raise ``UserError`` for a draft family that is not trained by unrolling."""
    if getattr(draft, "objective", "unroll") != "unroll":
        raise UserError(f"replay is for drafts that train by unrolling; {type(draft).__name__} does not")


# -- training --------------------------------------------------------------------------------------------------------
@dataclass
class ReplayBatch(Batch):
    """Packed rows with the weight of every state, [M, J]."""

    weight_MJ: Tensor

    def to(self, device: torch.device) -> ReplayBatch:
        return ReplayBatch(**{name: value.to(device) for name, value in vars(self).items()})


class ReplayObjective(UnrollObjective):
    """The weighted mean of the loss over the states of a :class:`ReplayBatch`.

    One mean over all steps and no step decay: the weights say already how often a step is reached.
    """

    def weights(self, batch: Batch, inside_MJ: Tensor) -> Tensor:
        """What each state's loss counts for, [M, J]; over all workers they sum to 1."""
        assert isinstance(batch, ReplayBatch)
        weight_MJ = batch.weight_MJ * inside_MJ
        return weight_MJ / self.reduce(weight_MJ.sum()).clamp(min=1e-9)


class ReplayTrainer(Trainer):
    """A :class:`Trainer` over the rows that lost a round, on the states where decoding meets them."""

    def __init__(
        self,
        draft: Any,
        target: Head,
        store: FeatureSource,
        rows: Sequence[Row],
        heldout: Sequence[Row],
        config: TrainConfig,
        folder: Path,
        states: Mapping[str, Tensor],
        origin: str = "",
    ) -> None:
        """``config.unroll`` must be the steps of ``states``. Raises ``UserError`` as :class:`Trainer` does, for a
        draft family that is not trained by unrolling, and when no round was lost."""
        if not states:
            raise UserError("no round ended early, so there is nothing to replay")
        check_replayable(draft)
        self.states = states
        super().__init__(draft, target, store, [r for r in rows if r.key in states], heldout, config, folder, origin)

    def new_objective(self) -> Objective:
        """The loss on the states of the walk, plus what the draft itself asks for."""
        objective = ReplayObjective(self.draft, self.target, self.config, reduce=self.shares.sum)
        return with_extra_loss(objective, self.draft)

    def collated(self, rows: Sequence[Row]) -> Batch:
        """As the trainer's, with the weights of the rows' states."""
        plain = super().collated(rows)
        return ReplayBatch(**vars(plain), weight_MJ=torch.cat([self.states[row.key] for row in rows]))


def replay_settings(config: TrainConfig, replay: ReplayConfig) -> TrainConfig:
    """The settings of a pass: shorter, slower, and unrolled as far as a round can go."""
    return replace(
        config,
        epochs=replay.epochs,
        learning_rate=config.learning_rate * replay.rate,
        unroll=config.gamma,
    )
