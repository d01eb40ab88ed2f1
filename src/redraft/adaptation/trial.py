"""A trial adaptation: the default method on a few of the target's answers, measured on those it did not see.

The answers are dealt into two halves. A copy of the draft, from a refreshed vocabulary as ``adapt`` starts, is
trained on one half and walked over the other, and the other way round, so that every answer is measured once by a draft
that was not trained on it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from redraft.acceptance.simulate import simulate_greedy_chain
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.drafts.groups import prepare
from redraft.errors import UserError
from redraft.evaluate.forecast import shipped
from redraft.evaluate.speed import tau_interval
from redraft.features import FeatureStore
from redraft.rows import anchors
from redraft.settings.runs import adaptation
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.starts.apply import StartContext, apply_start
from redraft.target import Target
from redraft.training.trainer import Trainer

METHOD, START = "lora", "vocabulary"
# Few answers seen often, in small steps.
PASSES, STEP_TOKENS = 8.0, 256
FEWEST_ANSWERS = 4


@dataclass(frozen=True)
class Trial:
    """``tau`` of all answers, each by the draft that was trained on the other half, with its interval.

    ``tokens`` are the supervised positions of both trainings, ``seconds`` what these took.
    """

    tau: dict[str, float]
    answers: int
    tokens: int
    seconds: float


def check_trial(draft: Draft) -> None:
    """Raise ``UserError`` for a draft of a family that there is no forecast for, which a trial would narrow."""
    known = shipped().families
    if draft.family not in known:
        raise UserError(
            f"a trial adapts {' and '.join(known)} drafts, this one is of the family {draft.family}; leave --trial out"
        )


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that can be measured, dealt out in turn in the order of their keys."""
    ordered = sorted((row for row in rows if anchors(row)), key=lambda row: row.key)
    return ordered[::2], ordered[1::2]


def trial(
    target: Target,
    draft: Draft,
    rows: Sequence[Row],
    store: FeatureStore,
    gamma: int,
    seed: int = 0,
    progress: Callable[..., None] | None = None,
) -> Trial:
    """Train twice, walk twice. ``draft`` stays as it is; ``store`` holds the features of ``rows``.

    Raises ``UserError`` for fewer answers than four, and what training raises.
    """
    parts = halves(rows)
    if sum(map(len, parts)) < FEWEST_ANSWERS:
        raise UserError(
            f"a trial adaptation needs {FEWEST_ANSWERS} answers of two tokens or more, there are "
            f"{sum(map(len, parts))}; give more prompts, or leave --trial out"
        )
    found: dict[str, list[int]] = {}
    tokens, seconds = 0, 0.0
    for seen, unseen in (parts, parts[::-1]):
        accepted, result = _half(target, draft, seen, unseen, store, gamma, seed, progress)
        found |= accepted
        tokens, seconds = tokens + result[0], seconds + result[1]
    tau = tau_interval(found, {row.key: anchors(row) for part in parts for row in part})
    return Trial(tau, sum(map(len, parts)), tokens, seconds)


def _half(
    target: Target,
    draft: Draft,
    seen: Sequence[Row],
    unseen: Sequence[Row],
    store: FeatureStore,
    gamma: int,
    seed: int,
    progress: Callable[..., None] | None,
) -> tuple[Mapping[str, list[int]], tuple[int, float]]:
    """Rounds over ``unseen`` after training on ``seen``; supervised positions and seconds of the training."""
    own = copy.deepcopy(draft).float()
    started = apply_start(START, own, StartContext(target, rows=seen, gamma=gamma, seed=seed)).draft
    prepared, _ = prepare(started, METHOD, PrivateSize(), seed, target)
    settings = adaptation(METHOD) | {"epochs": PASSES, "batch_anchors": STEP_TOKENS, "gamma": gamma, "seed": seed}
    config = TrainConfig(**settings | {"evaluate_every": 10**9, "patience": 0})
    with tempfile.TemporaryDirectory(prefix="redraft-trial-", ignore_cleanup_errors=True) as folder:
        # The best weights are chosen on what was seen: nothing may be chosen on the answers that are measured.
        trainer = Trainer(prepared, target, store, seen, seen, config, Path(folder))
        result = trainer.run(None)
    if progress:
        progress(len(seen))
    return simulate_greedy_chain(trainer.draft, target, unseen, store, gamma), (result.anchors, result.seconds)
