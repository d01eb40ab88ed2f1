"""Every acceptance metric, defined once.

A *round* is one draft proposal and one verification by the target. What a round records:

``accepted``  the draft tokens that the verification rule accepted; the bonus or corrected token that follows is
              not counted, so a round of ``accepted`` = a gives a + 1 tokens;
``drafted``   the draft tokens that were proposed (the last round of a request may propose fewer).

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

    Raises ``ValueError`` when a round accepted more than ``gamma`` tokens: those rounds were not such a chain.
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

    ``drafted`` is the number of tokens proposed in each round, or one number for all. A position that no round
    reached is ``nan``. Raises ``ValueError`` when a round accepted more than it drafted.
    """
    _, reached, taken = _reached(accepted, drafted, gamma)
    return [_ratio(t, r) for t, r in zip(taken, reached, strict=True)]


def acceptance_unconditional(accepted: Rounds, drafted: Rounds | int, gamma: int) -> list[float]:
    """Share of rounds that accept position j = 1..gamma among all that proposed it. Arguments as above.

    When every round proposes gamma tokens, the sum of these shares + 1 is ``tau_pooled`` before the stop rule's cut.
    """
    proposed, _, taken = _reached(accepted, drafted, gamma)
    return [_ratio(t, p) for t, p in zip(taken, proposed, strict=True)]


def overlap(target_probs_NV: Tensor, draft_probs_NV: Tensor) -> Tensor:
    """sum_x min(target_probs, draft_probs) at each position [N]: 1 - TV, the chance that the draft's token is kept."""
    return target_probs_NV.minimum(draft_probs_NV).sum(-1)


def alpha(target_probs_NV: Tensor, draft_probs_NV: Tensor) -> float:
    """Acceptance rate: the mean of :func:`overlap` over drafted positions (arXiv 2211.17192, theorem 3.5)."""
    each = overlap(target_probs_NV, draft_probs_NV)
    return _ratio(float(each.double().sum()), each.numel())


def mbsu(tau: float, gamma: int, cost: float) -> float:
    """Memory-bound speed-up tau / (cost * gamma + 1) (Goel et al., arXiv 2403.00858).

    ``cost`` is one draft step over one target step: a ratio of times or of parameter bytes; the caller says which
    beside the figure.
    """
    return tau / (cost * gamma + 1)


def recovery(tau: float, tau_stale: float, tau_full: float) -> float:
    """Share of the gap between the stale draft and full retraining that was won back.

    (tau - tau_stale) / (tau_full - tau_stale); above 1 when it beats full retraining, ``nan`` when the gap is 0.
    """
    return _ratio(tau - tau_stale, tau_full - tau_stale)
