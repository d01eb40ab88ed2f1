"""Acceptance and its worth: the definitions behind every figure.

A *round* is one draft proposal and one verification by the target. What a round records:

``accepted``  the draft tokens that the verification rule accepted; the bonus or corrected token that follows is
              not counted, so a round of ``accepted`` = a gives a + 1 tokens;
``drafted``   how many tokens could have been accepted: the length of a chain, the depth of a tree (its longest
              path). The last round of a request may propose fewer.

A tree needs no metrics of its own: its round accepts one path, so tau is the same quotient, and "position j" of the
per-position figures is depth j.

``tau_pooled`` is tokens produced / rounds, ``tau_macro`` the mean over requests of the same; both are ratios of sums
over prompts and come with their intervals from :mod:`redraft.evaluate.statistics`. The stop rule (an end token, the
token limit) may cut the last round of a request short: tau counts the tokens after that cut, which the reader got, and
acceptance what verification accepted, which describes the draft alone. The first token of a response comes from
prefill: it belongs to no round and counts nowhere. Requests without a round (the first token ended them) carry no
information and are left out of every mean. A metric of no rounds at all is ``nan``.

Shape legend: N drafted positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Rounds = Sequence[Sequence[int]]


def acceptance_by_position(accepted: Rounds, drafted: Rounds, gamma: int) -> tuple[list[float], list[float]]:
    """(conditional, unconditional) share of rounds that accept position j = 1..gamma, of the rounds of all requests.

    Conditional: among those that reached it (accepted all before it). Unconditional: among all that proposed it; when
    every round proposes gamma tokens these sum to tau - 1, before the stop rule's cut. ``nan`` where there is no such
    round. Raises ``ValueError`` when a round accepted more than it drafted.
    """
    proposed, reached, taken = [0] * gamma, [0] * gamma, [0] * gamma
    for index, (rounds, widths) in enumerate(zip(accepted, drafted, strict=True)):
        for count, width in zip(rounds, widths, strict=True):
            if not 0 <= count <= width:
                raise ValueError(f"request {index}: a round accepted {count} of {width} drafted tokens")
            for position in range(min(width, gamma)):
                proposed[position] += 1
                reached[position] += count >= position
                taken[position] += count > position
    conditional, unconditional = (
        [part / whole if whole else math.nan for part, whole in zip(taken, of, strict=True)]
        for of in (reached, proposed)
    )
    return conditional, unconditional


def overlap(target_probs_NV: Tensor, draft_probs_NV: Tensor) -> Tensor:
    """sum_x min(target_probs, draft_probs) at each position [N]: 1 - TV, the chance that a sampled draft is kept.

    Its mean over drafted positions is alpha (Leviathan et al., arXiv 2211.17192, theorem 3.5). A greedy draft proposes
    one token x for certain, a point mass: it is kept with probability target(x), the overlap with the one-hot of x.
    """
    return target_probs_NV.minimum(draft_probs_NV).sum(-1)


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


def mbsu(tau: float, gamma: float, cost: float) -> float:
    """Memory-bound speed-up tau / (cost * gamma + 1) (Goel et al., arXiv 2403.00858).

    It is the speed-up if a round cost nothing but its forward passes, and the verifying one no more than a step of
    plain decoding (Leviathan et al., arXiv 2211.17192, theorem 3.8, with the measured tau in place of the one that a
    constant acceptance rate implies). ``cost`` is one draft step over one target step, from :func:`cost_by_bytes` or
    :func:`cost_by_time`; the caller says which beside the figure.
    """
    return tau / (1 + gamma * cost)
