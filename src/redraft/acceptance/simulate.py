"""Acceptance of a chain without decoding: the draft's rounds walked over stored responses of the target.

While every earlier proposal of a round was accepted, the draft's inputs are the response's own tokens, so
teacher-forced passes give the very proposals (greedy) or distributions (sampled) that decoding would have; walking
the rounds then gives the chain's acceptance. An average over all positions would be too high, because rounds start
where the last one failed. How a draft's proposals over a stored text are computed is its family's business
(:class:`redraft.drafts.proposing.Walk`); here are the rounds.

*Greedy chain*: the walk is the decoding (:func:`simulate_greedy_chain`).

*Sampled chain*: the rounds are random, but given the text their distribution is known. Let a round start behind the
tokens s, let t_i and d_i be the warped target and draft at its i-th position along a continuation x_1, x_2, ..., and

    w_i = min(1, d_i(x_i) / t_i(x_i)).

Verification proposes x_i with probability d_i(x_i) and keeps it with min(1, t_i(x_i) / d_i(x_i)), so "x_i comes by
acceptance" has probability min(t_i, d_i)(x_i) = t_i(x_i) w_i. A rejection, probability 1 - sum_x min(t_i, d_i)(x),
draws from (t_i - d_i)^+ normalised by the same number, so "x_i comes as the corrected token" has probability
t_i(x_i) - min(t_i, d_i)(x_i) = t_i(x_i) (1 - w_i). Hence a round gives exactly a < gamma accepted tokens and then the
corrected one with probability

    [t_1(x_1) ... t_a+1(x_a+1)] * w_1 ... w_a (1 - w_a+1),

and a full round with its bonus token with [t_1(x_1) ... t_gamma+1(x_gamma+1)] * w_1 ... w_gamma. Multiplied over the
rounds of a response, the brackets make the target's own probability of the text, whatever the rounds (this is the
proof that the rule is lossless), and what is left is the probability of the rounds *given* the text: from a start,
the walk accepts exactly a tokens with probability w_1 ... w_a (1 - w_a+1) and starts again behind the next one. The
expected number of visited starts, by dynamic programming (:func:`visits`), is therefore exactly the expected number
of rounds of the decodings that give this text; averaged over responses drawn from the target it is the expectation
over all. What is cut off at the end of a response changes nothing: the probabilities of the invisible tokens sum
to 1. A token outside the draft's vocabulary has d = 0 and is never accepted.

*Greedy drafts under a sampling target*: d is a point mass, so a token comes by acceptance if and only if it is the
draft's argmax: the greedy walk again, over sampled text, and exact.

Shape legend: A anchors of one response, J draft steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from redraft.data.store import REFERENCE, Row
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.features import FeatureSource
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.target import Head


# -- the walk --------------------------------------------------------------------------------------------------------
def walk(run_lengths: Sequence[int]) -> list[int]:
    """Accepted tokens of each round, from the run length at every anchor of one response."""
    accepted, at = [], 0
    while at < len(run_lengths):
        accepted.append(run_lengths[at])
        at += run_lengths[at] + 1
    return accepted


def visits(chances_AJ: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probability [A] that a round starts at each anchor of one response, from w [A, J]. Their sum is the expectation
    of the number of rounds.

    Forward dynamic programming: the first round starts at anchor 0; from a start at m the next one is at m + a + 1
    with probability w_1 ... w_a (1 - w_a+1), and at m + J + 1 with w_1 ... w_J. Starts behind the end are dropped.
    """
    count, steps = chances_AJ.shape
    reached = np.concatenate([np.ones((count, 1)), np.cumprod(chances_AJ, axis=1)], axis=1)
    leave = reached * np.concatenate([1 - chances_AJ, np.ones((count, 1))], axis=1)
    starts = np.zeros(count + steps + 1)
    starts[:1] = 1.0
    for anchor in range(count):
        starts[anchor + 1 : anchor + steps + 2] += starts[anchor] * leave[anchor]
    return starts[:count]


def tau_of(accepted: Mapping[str, Sequence[int]], rows: Sequence[Row]) -> float:
    """tau_pooled of a simulated greedy chain, from the accepted tokens of every round; 0 without rounds."""
    total = sum(map(len, accepted.values()))
    return sum(anchors(row) for row in rows if row.key in accepted) / total if total else 0.0


# -- drafts over stored rows -----------------------------------------------------------------------------------------
@torch.inference_mode()
def simulate_greedy_chain(
    draft: Draft, target: Head, rows: Sequence[Row], store: FeatureSource | None, gamma: int
) -> dict[str, list[int]]:
    """Accepted draft tokens of every round, by row key. ``rows`` must hold greedy responses of this target.

    Accepted tokens are counted up to the end of the response; verification may accept more behind an end token,
    which nobody sees. On sampled responses this is the chain of greedy drafts under that sampler. ``store`` has the
    rows' features; a draft without taps needs none.
    """
    return {row.key: walk(runs) for row, runs in draft.walk(target).runs(rows, store, gamma)}


@torch.inference_mode()
def expected_rounds_sampled(
    draft: Draft,
    target: Head,
    rows: Sequence[Row],
    store: FeatureSource | None,
    gamma: int,
    sampler: Sampler,
    greedy_drafts: bool = False,
) -> dict[str, float]:
    """Expected rounds of a chain of ``gamma`` given each response, by row key; exact, see the module's docstring.

    ``rows`` must hold responses of this target drawn with ``sampler``. ``greedy_drafts``: the draft proposes its
    likeliest token whatever the sampler. Rows without an anchor have no round and are left out. Raises ``UserError``
    for rows of another sampler, whose text would follow another distribution.
    """
    for row in rows:
        check_own(row)
        drawn = Sampler(row.temperature, row.top_k, row.top_p)
        if drawn != sampler and not (drawn.greedy and sampler.greedy):
            raise UserError(
                f"response {row.key} was drawn with {drawn.describe()}, the chain samples with {sampler.describe()}; "
                "give responses of the same sampler"
            )
    found = draft.walk(target).chances(rows, store, gamma, Sampler() if greedy_drafts else sampler)
    return {row.key: float(visits(chances_AJ.double().numpy()).sum()) for row, chances_AJ in found}


@torch.inference_mode()
def row_alphas(draft: Draft, target: Head, rows: Sequence[Row], store: FeatureSource | None) -> list[float]:
    """alpha of the first drafted position, averaged over each row's anchors, in the order of ``rows``.

    The target's probabilities are over its whole vocabulary, so what the draft cannot say counts against it. Rows
    without an anchor give 0.
    """
    found = {row.key: alpha for row, alpha in draft.walk(target).alphas(rows, store)}
    return [found.get(row.key, 0.0) for row in rows]


def check_own(row: Row) -> None:
    """Raise ``UserError`` for a reference answer: decoding would not produce it, so it has no rounds."""
    if row.source == REFERENCE:
        raise UserError(f"{row.key} is a reference answer; rounds can be told of the target's own responses alone")
