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

Shape legend: A anchors of one response, J draft steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from redraft.acceptance.simulate import check_own, visits
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.drafts.walks import run_lengths
from redraft.errors import UserError
from redraft.features import FeatureSource
from redraft.progress import Progress
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.settings.training import ReplayConfig, TrainConfig
from redraft.target import Head
from redraft.training.trainer import Trainer


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
    answers, which decoding would not produce.
    """
    for row in rows:
        check_own(row)
    groups: dict[Sampler, list[Row]] = {}
    for row in rows:
        sampler = Sampler() if greedy_drafts else Sampler(row.temperature, row.top_k, row.top_p)
        groups.setdefault(sampler, []).append(row)
    found, done, walk = ReplayStates({}, 0.0, 0.0), 0, draft.walk(target)
    sayable = set(draft.vocabulary().tolist())
    for sampler, group in groups.items():
        for row, chances_AJ in walk.chances(group, store, gamma, sampler):
            # How far the draft can be right behind each anchor.
            steps = run_lengths([token in sayable for token in row.response_ids[1:]], gamma)
            _add(row, chances_AJ.double().numpy(), np.array(steps), config, found)
            done += anchors(row)
            if progress is not None:
                progress.update(done)
    return found


def _add(
    row: Row,
    chances_AJ: npt.NDArray[np.float64],
    steps_A: npt.NDArray[np.int64],
    config: ReplayConfig,
    found: ReplayStates,
) -> None:
    """Add a row to what was found."""
    reached, failed = lost_states(chances_AJ, steps_A)
    inside = np.arange(chances_AJ.shape[1]) < steps_A[:, None]
    weight = config.accepted * (reached - failed) + config.failed * failed + config.floor * inside
    found.rounds += float(visits(chances_AJ).sum())
    found.lost_rounds += float(failed.sum())
    if failed.sum() > 0:
        found.weights[row.key] = torch.from_numpy(weight).float()


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


# -- training --------------------------------------------------------------------------------------------------------
def replay_trainer(
    draft: Draft,
    target: Head,
    store: FeatureSource,
    rows: Sequence[Row],
    heldout: Sequence[Row],
    config: TrainConfig,
    folder: Path,
    states: Mapping[str, Tensor],
    origin: str = "",
) -> Trainer:
    """A trainer over the rows that lost a round, on the states where decoding meets them.

    Arguments as of :class:`Trainer`, and the ``states`` of :func:`replay_states`, whose steps must be
    ``config.unroll``. Raises ``UserError`` as :class:`Trainer` does, for a draft family that is not trained by
    unrolling, and when no round was lost.
    """
    if not states:
        raise UserError("no round ended early, so there is nothing to replay")
    check_replayable(draft)
    lost = [row for row in rows if row.key in states]
    return Trainer(draft, target, store, lost, heldout, config, folder, origin, weights=states)


def replay_settings(config: TrainConfig, replay: ReplayConfig) -> TrainConfig:
    """The settings of a pass: shorter, slower, and unrolled as far as a round can go."""
    return replace(
        config,
        epochs=replay.epochs,
        learning_rate=config.learning_rate * replay.rate,
        unroll=config.gamma,
    )
