"""Acceptance of a chain without decoding: one teacher-forced unroll over stored responses of the target.

While every earlier proposal of a round was accepted, the draft's inputs are the response's own tokens, so the
teacher-forced unroll gives the very proposals (greedy) or distributions (sampled) that decoding would have; walking
the rounds then gives the chain's acceptance. An average over all positions would be too high, because rounds start
where the last one failed.

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

Shape legend: M packed anchors, A anchors of one response, J draft steps, N rows, V target vocabulary, D draft
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from redraft.acceptance.unroll import Batch, collate, unroll
from redraft.data.store import REFERENCE, Row
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.features.store import FeatureStore, anchors
from redraft.sampling import Sampler, token_probability
from redraft.target import Target

# Rows of logits that probabilities are taken from at once: enough for the head's product, few enough for the cache.
CHUNK = 128
# Rows of logits whose best token is looked for at once.
ROWS = 256


def anchor_batches(rows: Sequence[Row], batch_anchors: int) -> Iterator[list[Row]]:
    """Rows of similar length together, at most ``batch_anchors`` supervised positions a batch.

    Rows of equal length keep the order they are given in.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda r: len(r.prompt_ids) + len(r.response_ids)):
        if not anchors(row):
            continue
        if batch and sum(anchors(r) for r in batch) + anchors(row) > batch_anchors:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def matches(draft: Draft, target: Target, batch: Batch, gamma: int) -> Tensor:
    """How many proposals in a row are right when a round starts at each anchor, [M], at most ``gamma``.

    An anchor whose proposal was wrong is not drafted from any further.
    """
    vocabulary = draft.bind(target).vocabulary()
    runs_M = torch.zeros(len(batch.future_MJ), dtype=torch.long, device=batch.future_MJ.device)

    def right(step: int, places: Tensor, states: Tensor) -> Tensor:
        # In portions: a family that speaks the whole vocabulary has a wide row of logits.
        best = torch.cat([draft.logits(part).argmax(-1) for part in states.split(ROWS)])
        found = vocabulary[best] == batch.future_MJ[places, step]
        runs_M[places[found]] += 1
        return found

    _draft_on(draft, target, batch, gamma, right)
    return runs_M


def _draft_on(
    draft: Draft, target: Target, batch: Batch, gamma: int, judge: Callable[[int, Tensor, Tensor], Tensor]
) -> None:
    """Unroll at most ``gamma`` steps, each from the anchors alone that the step before was worth it for.

    ``judge(step, places, states)`` sees which anchors are left and their states, and says which of them go on.
    """
    places = torch.arange(len(batch.future_MJ), device=batch.future_MJ.device)
    drafting = unroll(draft, target.embedding, batch, gamma)
    states = next(drafting)
    for step in range(gamma):
        keep = judge(step, places, states)
        places = places[keep]
        if step + 1 == gamma or not len(places):
            break
        states = drafting.send(keep)


def walk(run_lengths: Sequence[int]) -> list[int]:
    """Accepted tokens of each round, from the run length at every anchor of one response."""
    accepted, at = [], 0
    while at < len(run_lengths):
        accepted.append(run_lengths[at])
        at += run_lengths[at] + 1
    return accepted


def matches_by_key(
    draft: Draft, target: Target, rows: Sequence[Row], store: FeatureStore, gamma: int, batch_anchors: int
) -> Iterator[tuple[str, list[int]]]:
    """Row by row its key and the run length at every anchor (see :func:`matches`)."""
    for group in anchor_batches(sorted(rows, key=lambda r: r.key), batch_anchors):
        batch = collate(group, store, gamma).to(target.device)
        with torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype == torch.bfloat16):
            runs = matches(draft, target, batch, gamma)
        for row, part in zip(group, runs.split([anchors(r) for r in group]), strict=True):
            yield row.key, part.tolist()


@torch.inference_mode()
def simulate_greedy_chain(
    draft: Draft,
    target: Target,
    rows: Sequence[Row],
    store: FeatureStore,
    gamma: int,
    batch_anchors: int = 1024,
) -> dict[str, list[int]]:
    """Accepted draft tokens of every round, by row key. ``rows`` must hold greedy responses of this target.

    Accepted tokens are counted up to the end of the response; verification may accept more behind an end token,
    which nobody sees. On sampled responses this is the chain of greedy drafts under that sampler.
    """
    found = matches_by_key(draft, target, rows, store, gamma, batch_anchors)
    return {key: walk(runs) for key, runs in found}


@torch.inference_mode()
def expected_rounds_sampled(
    draft: Draft,
    target: Target,
    rows: Sequence[Row],
    store: FeatureStore,
    gamma: int,
    sampler: Sampler,
    greedy_drafts: bool = False,
    batch_anchors: int = 1024,
) -> dict[str, float]:
    """Expected rounds of a chain of ``gamma`` given each response, by row key; exact, see the module's docstring.

    ``rows`` must hold responses of this target drawn with ``sampler``. ``greedy_drafts``: the draft proposes its
    likeliest token whatever the sampler. Rows without an anchor have no round and are left out. Raises ``UserError``
    for rows of another sampler, whose text would follow another distribution.
    """
    check_sampler(rows, sampler)
    if greedy_drafts:
        found = matches_by_key(draft, target, rows, store, gamma, batch_anchors)
        return {key: float(len(walk(runs))) for key, runs in found}
    expected: dict[str, float] = {}
    for group in anchor_batches(sorted(rows, key=lambda r: r.key), batch_anchors):
        batch = collate(group, store, gamma).to(target.device)
        chances_MJ = acceptance_given_text(draft, target, batch, gamma, sampler).double().cpu()
        for row, part_AJ in zip(group, chances_MJ.split([anchors(r) for r in group]), strict=True):
            expected[row.key] = float(visits(part_AJ.numpy()).sum())
    return expected


def check_own(row: Row) -> None:
    """Raise ``UserError`` for a reference answer: decoding would not produce it, so it has no rounds."""
    if row.source == REFERENCE:
        raise UserError(f"{row.key} is a reference answer; rounds can be told of the target's own responses alone")


def check_sampler(rows: Sequence[Row], sampler: Sampler) -> None:
    """Raise ``UserError`` when a response was drawn with another sampler, or by nobody."""
    for row in rows:
        check_own(row)
        drawn = Sampler(row.temperature, row.top_k, row.top_p)
        if drawn != sampler and not (drawn.greedy and sampler.greedy):
            raise UserError(
                f"response {row.key} was drawn with {drawn.describe()}, the chain samples with {sampler.describe()}; "
                "give responses of the same sampler"
            )


def acceptance_given_text(draft: Draft, target: Target, batch: Batch, gamma: int, sampler: Sampler) -> Tensor:
    """w [M, J]: the chance that the j-th token behind each anchor came by acceptance, given that it came.

    min(1, draft / target) of that token under the warped distributions; 0 behind the end of the response and behind a
    token that cannot be accepted. Where the target's probability is 0 by rounding (the token was drawn, so it was
    not), the limit is taken: 1 if the draft gives it any.
    """
    place_V = torch.full((target.vocab_size,), -1, device=batch.future_MJ.device)
    place_V[draft.bind(target).vocabulary()] = torch.arange(draft.config.draft_vocab_size, device=place_V.device)
    future_MJ = batch.future_MJ
    autocast = torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype == torch.bfloat16)
    # The target's probability of a token does not depend on where the round began: one row of logits an anchor.
    target_M = _probability(target.logits, batch.hidden_M, future_MJ[:, 0], sampler)
    chances_MJ = torch.zeros(len(target_M), gamma, device=target_M.device)

    def reached(step: int, places: Tensor, states: Tensor) -> Tensor:
        index = place_V[future_MJ[places, step].clamp(min=0)]
        # What the draft cannot say needs no softmax, and what no round reaches is not drafted at all.
        wanted = (future_MJ[places, step] >= 0) & (index >= 0)
        found = torch.zeros_like(target_M[places])
        found[wanted] = _probability(draft.logits, states[wanted], index[wanted], sampler)
        # Anchors of a row stand side by side, so the target's row of step j is that of the anchor j places on.
        towards = target_M[(places + step).clamp(max=len(target_M) - 1)]
        chances = torch.where(towards > 0, (found / towards).clamp(max=1.0), (found > 0).float())
        chances_MJ[places, step] = chances
        return chances > 0

    with autocast:
        _draft_on(draft, target, batch, gamma, reached)
    return chances_MJ


def _probability(logits_of: Callable[[Tensor], Tensor], states_NH: Tensor, index_N: Tensor, sampler: Sampler) -> Tensor:
    """The warped probability of one token a row, [N], in portions of ``CHUNK`` rows."""
    parts = zip(states_NH.split(CHUNK), index_N.split(CHUNK), strict=True)
    return torch.cat([token_probability(logits_of(states), index, sampler) for states, index in parts])


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


def tau_expected(rounds: Mapping[str, float], rows: Sequence[Row]) -> float:
    """tau_pooled from rounds by row key: tokens after the first of every response, over rounds; 0 without rounds."""
    total = sum(rounds.values())
    return sum(anchors(r) for r in rows if r.key in rounds) / total if total else 0.0


def tau_of(accepted: Mapping[str, Sequence[int]], rows: Sequence[Row]) -> float:
    """tau_pooled of a simulated greedy chain, from the accepted tokens of every round."""
    return tau_expected({key: len(rounds) for key, rounds in accepted.items()}, rows)


@torch.inference_mode()
def row_alphas(
    draft: Draft, target: Target, rows: Sequence[Row], store: FeatureStore, batch_anchors: int = 256
) -> list[float]:
    """alpha of the first drafted position, averaged over each row's anchors, in the order of ``rows``.

    The target's probabilities are over its whole vocabulary, so what the draft cannot say counts against it. Rows
    without an anchor give 0.
    """
    alphas = {row.key: 0.0 for row in rows}
    vocabulary = draft.bind(target).vocabulary()
    for group in anchor_batches(sorted(rows, key=lambda r: r.key), batch_anchors):
        batch = collate(group, store, 1).to(target.device)
        with torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype == torch.bfloat16):
            states = next(unroll(draft, target.embedding, batch, 1))
            draft_probs = draft.logits(states).float().softmax(-1)
        logits = target.logits(batch.hidden_M).float()
        target_probs = (logits[:, vocabulary] - logits.logsumexp(-1, keepdim=True)).exp()
        overlap = torch.minimum(target_probs, draft_probs).sum(-1)
        for row, part in zip(group, overlap.split([anchors(r) for r in group]), strict=True):
            alphas[row.key] = float(part.mean())
    return [alphas[row.key] for row in rows]
