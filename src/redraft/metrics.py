"""Every acceptance metric, defined once.

A *round* is one draft proposal and one verification by the target. What a round records:

``accepted``  the draft tokens that the verification rule accepted; the bonus or corrected token that follows is
              not counted, so a round of ``accepted`` = a gives a + 1 tokens;
``drafted``   how many tokens could have been accepted: the length of a chain, the depth of a tree (its longest
              path). The last round of a request may propose fewer.

A tree needs no metrics of its own: its round accepts one path, so tau is the same quotient, and "position j" of the
per-position figures is depth j. How much was proposed besides (``proposed``, a tree's nodes) matters only to
:func:`token_acceptance`.

The stop rule (an end token, the token limit) may cut the last round of a request short. ``accepted`` stays what
verification accepted, so that acceptance figures describe the draft alone, and ``tokens`` (tokens that the rounds
of a request produced, after the cut) says what the reader got. The first token of a response comes from prefill:
it belongs to no round and counts nowhere.

Requests without a round (the first token ended them) carry no information and are left out of every mean. A
metric of no rounds at all is ``nan``.

Shape legend: N drafted positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Rounds = Sequence[Sequence[int]]


def tokens_of_rounds(accepted: Rounds) -> list[int]:
    """Tokens that each request's rounds give before any cut by the stop rule: accepted + 1 a round."""
    return [sum(rounds) + len(rounds) for rounds in accepted]


def _produced(accepted: Rounds, tokens: Sequence[int] | None) -> list[int]:
    """``tokens``, checked: the stop rule cuts within the last round only, and leaves at least one token of it."""
    whole = tokens_of_rounds(accepted)
    if tokens is None:
        return whole
    if len(tokens) != len(accepted):
        raise ValueError(f"{len(tokens)} token counts for {len(accepted)} requests")
    for index, (rounds, most, given) in enumerate(zip(accepted, whole, tokens, strict=True)):
        least = most - rounds[-1] if rounds else 0
        if not least <= given <= most:
            raise ValueError(f"request {index}: {given} tokens do not fit its rounds, which give {least} to {most}")
    return list(tokens)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def tau_pooled(accepted: Rounds, tokens: Sequence[int] | None = None) -> float:
    """Tokens produced by all rounds / number of rounds, the bonus token included.

    ``accepted`` holds one list a request. ``tokens`` is each request's token count after the stop rule's cut, the
    token of prefill not counted; without it no round was cut. Raises ``ValueError`` when the two contradict.
    """
    return _ratio(sum(_produced(accepted, tokens)), sum(len(rounds) for rounds in accepted))


def tau_macro(accepted: Rounds, tokens: Sequence[int] | None = None) -> float:
    """Mean over requests of tokens / rounds. Arguments as for :func:`tau_pooled`."""
    produced = _produced(accepted, tokens)
    each = [count / len(rounds) for count, rounds in zip(produced, accepted, strict=True) if rounds]
    return _ratio(sum(each), len(each))


def block_efficiency(accepted: Rounds, gamma: int, tokens: Sequence[int] | None = None) -> float:
    """``tau_pooled`` of a chain of ``gamma`` draft tokens (Leviathan et al., arXiv 2211.17192); at most gamma + 1.

    For a tree ``gamma`` is its depth. Raises ``ValueError`` when a round accepted more than ``gamma`` tokens: those
    rounds were not such a chain.
    """
    longest = max((a for rounds in accepted for a in rounds), default=0)
    if longest > gamma:
        raise ValueError(f"a round accepted {longest} tokens, more than gamma = {gamma}")
    return tau_pooled(accepted, tokens)


def _reached(accepted: Rounds, drafted: Rounds | int, gamma: int) -> tuple[list[int], list[int], list[int]]:
    """Per position: rounds that proposed it, rounds that also reached it, rounds that accepted it."""
    proposed, reached, taken = [0] * gamma, [0] * gamma, [0] * gamma
    for index, rounds in enumerate(accepted):
        widths = [drafted] * len(rounds) if isinstance(drafted, int) else drafted[index]
        for count, width in zip(rounds, widths, strict=True):
            if not 0 <= count <= width:
                raise ValueError(f"request {index}: a round accepted {count} of {width} drafted tokens")
            for position in range(min(width, gamma)):
                proposed[position] += 1
                reached[position] += count >= position
                taken[position] += count > position
    return proposed, reached, taken


def acceptance_conditional(accepted: Rounds, drafted: Rounds | int, gamma: int) -> list[float]:
    """Share of rounds that accept position j = 1..gamma among those that reached it (accepted all before it).

    ``drafted`` is the length of each round's chain or the depth of its tree, or one number for all. A position that
    no round reached is ``nan``. Raises ``ValueError`` when a round accepted more than it drafted.
    """
    _, reached, taken = _reached(accepted, drafted, gamma)
    return [_ratio(t, r) for t, r in zip(taken, reached, strict=True)]


def acceptance_unconditional(accepted: Rounds, drafted: Rounds | int, gamma: int) -> list[float]:
    """Share of rounds that accept position j = 1..gamma among all that proposed it. Arguments as above.

    When every round proposes gamma tokens, the sum of these shares + 1 is ``tau_pooled`` before the stop rule's cut.
    """
    proposed, _, taken = _reached(accepted, drafted, gamma)
    return [_ratio(t, p) for t, p in zip(taken, proposed, strict=True)]


def token_acceptance(accepted: Rounds, proposed: Rounds | int) -> float:
    """Accepted / proposed draft tokens over all rounds: what engines print as their acceptance rate.

    ``proposed`` counts every proposed token of each round, all nodes of a tree, or is one number for all. It falls
    with every token that is proposed behind a likely rejection, so it compares drafts only at one and the same shape.
    Raises ``ValueError`` when a round accepted more than it proposed.
    """
    taken = total = 0
    for index, rounds in enumerate(accepted):
        widths = [proposed] * len(rounds) if isinstance(proposed, int) else proposed[index]
        for count, width in zip(rounds, widths, strict=True):
            if not 0 <= count <= width:
                raise ValueError(f"request {index}: a round accepted {count} of {width} proposed tokens")
            taken, total = taken + count, total + width
    return _ratio(taken, total)


# -- acceptance of distributions -------------------------------------------------------------------------------------
def overlap(target_probs_NV: Tensor, draft_probs_NV: Tensor) -> Tensor:
    """sum_x min(target_probs, draft_probs) at each position [N]: 1 - TV, the chance that a sampled draft is kept."""
    return target_probs_NV.minimum(draft_probs_NV).sum(-1)


def point_overlap(target_probs_NV: Tensor, draft_ids_N: Tensor) -> Tensor:
    """target_probs of the proposed token at each position [N]: the chance that a greedy draft is kept.

    A greedy draft proposes one token x for certain, a point mass, so the acceptance rule min(1, target(x) / 1) keeps
    it with probability target(x): :func:`overlap` with the one-hot of x.
    """
    return target_probs_NV.gather(-1, draft_ids_N.unsqueeze(-1)).squeeze(-1)


def alpha(target_probs_NV: Tensor, draft_probs_NV: Tensor) -> float:
    """Acceptance rate of sampled drafts: the mean of :func:`overlap` over drafted positions.

    Source: Leviathan et al., arXiv 2211.17192, theorem 3.5.
    """
    return _mean(overlap(target_probs_NV, draft_probs_NV))


def alpha_greedy_drafts(target_probs_NV: Tensor, draft_ids_N: Tensor) -> float:
    """Acceptance rate of greedy drafts under a sampling target: the mean of :func:`point_overlap`.

    Never above the largest target probability; against sampled drafts of the same model it may be higher or lower.
    """
    return _mean(point_overlap(target_probs_NV, draft_ids_N))


def _mean(each_N: Tensor) -> float:
    return _ratio(float(each_N.double().sum()), each_N.numel())


# -- costs and speed -------------------------------------------------------------------------------------------------
def cost_by_bytes(draft_bytes: float, target_bytes: float) -> float:
    """c of a memory-bound machine: bytes of weights that a draft step reads / those that a target step reads.

    Bytes, not parameters: a draft in 16 bits beside a target in 4 counts four times a parameter. Weights that a step
    does not multiply (an embedding table) are in neither. Raises ``ValueError`` unless both are positive.
    """
    return _cost(draft_bytes, target_bytes)


def cost_by_time(draft_seconds: float, draft_steps: int, target_seconds: float, target_steps: int) -> float:
    """c as measured: mean seconds of a draft step / mean seconds of a step of plain decoding.

    A chain of gamma takes gamma draft steps a round, a tree as many as it is deep. Raises ``ValueError`` unless all
    four are positive.
    """
    return _cost(_cost(draft_seconds, draft_steps), _cost(target_seconds, target_steps))


def _cost(draft: float, target: float) -> float:
    if not (draft > 0 and target > 0):
        raise ValueError(f"a cost needs two positive amounts, not {draft} and {target}")
    return draft / target


def ideal_speedup(tau: float, draft_steps: float, cost: float, verify_cost: float = 1.0) -> float:
    """tau / (verify_cost + draft_steps * cost): the speed-up if a round cost nothing but its forward passes.

    Leviathan et al. (arXiv 2211.17192, theorem 3.8) with the measured tau in place of the one that a constant
    acceptance rate implies. ``verify_cost`` is the verifying pass over a step of plain decoding; 1 is the
    memory-bound assumption that checking many tokens costs as much as making one.
    """
    return tau / (verify_cost + draft_steps * cost)


def mbsu(tau: float, gamma: float, cost: float) -> float:
    """Memory-bound speed-up tau / (cost * gamma + 1) (Goel et al., arXiv 2403.00858).

    ``cost`` is one draft step over one target step, from :func:`cost_by_bytes` or :func:`cost_by_time`; the caller
    says which beside the figure. It is :func:`ideal_speedup` with a verification that costs one plain step.
    """
    return ideal_speedup(tau, gamma, cost)


def recovery(tau: float, tau_stale: float, tau_full: float) -> float:
    """Share of the gap between the stale draft and full retraining that was won back.

    (tau - tau_stale) / (tau_full - tau_stale); above 1 when it beats full retraining, ``nan`` when the gap is 0.
    """
    return _ratio(tau - tau_stale, tau_full - tau_stale)
