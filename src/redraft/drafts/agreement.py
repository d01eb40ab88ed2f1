"""How far a draft and its target agree, from logits: what the walks of all families compute alike.

Shape legend: N rows, M positions, H width, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from redraft.sampling import token_probability
from redraft.settings.sampler import Sampler

Logits = Callable[[Tensor], Tensor]

# Rows of logits that probabilities are taken from at once: enough for the head's product, few enough for the cache.
CHUNK = 128
# Rows of logits whose best token is looked for at once: a family that speaks the whole vocabulary has wide ones.
ROWS = 256


def likeliest(logits_of: Logits, states_NH: Tensor) -> Tensor:
    """The index [N] of the likeliest token of each row, in portions of ``ROWS``."""
    return torch.cat([logits_of(part).argmax(-1) for part in states_NH.split(ROWS)])


def probability(logits_of: Logits, states_NH: Tensor, index_N: Tensor, sampler: Sampler) -> Tensor:
    """The warped probability of one token a row, [N], in portions of ``CHUNK`` rows."""
    parts = zip(states_NH.split(CHUNK), index_N.split(CHUNK), strict=True)
    return torch.cat([token_probability(logits_of(states), index, sampler) for states, index in parts])


def sayable_probability(logits_of: Logits, states_NH: Tensor, index_N: Tensor, sampler: Sampler) -> Tensor:
    """As :func:`probability`, but 0 where the index is -1: what a draft cannot say needs no softmax."""
    wanted_N = index_N >= 0
    found_N = states_NH.new_zeros(len(index_N), dtype=torch.float32)
    if bool(wanted_N.any()):
        found_N[wanted_N] = probability(logits_of, states_NH[wanted_N], index_N[wanted_N], sampler)
    return found_N


def accepted_given_text(draft_N: Tensor, target_N: Tensor) -> Tensor:
    """min(1, draft / target) of tokens of the text.

    Where the target's probability is 0 by rounding (the token was drawn, so it was not), the limit is taken: 1 if the
    draft gives it any.
    """
    return torch.where(target_N > 0, (draft_N / target_N).clamp(max=1.0), (draft_N > 0).to(draft_N.dtype))


def places(vocabulary_D: Tensor, size: int) -> Tensor:
    """For every target id [V] its index in the draft vocabulary, -1 where the draft cannot say it."""
    place_V = torch.full((size,), -1, device=vocabulary_D.device)
    place_V[vocabulary_D] = torch.arange(len(vocabulary_D), device=vocabulary_D.device)
    return place_V


def overlap(draft_logits_MD: Tensor, target_logits_MV: Tensor, vocabulary_D: Tensor) -> Tensor:
    """sum_x min(target, draft) [M]; what the draft cannot say counts against it."""
    logits_MV = target_logits_MV.float()
    target_MD = (logits_MV[:, vocabulary_D] - logits_MV.logsumexp(-1, keepdim=True)).exp()
    return torch.minimum(target_MD, draft_logits_MD.float().softmax(-1)).sum(-1)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The precision that a walk computes in: bfloat16 beside a model of that type."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def run_lengths(right: list[bool], gamma: int) -> list[int]:
    """How many in a row are right from each place on, at most ``gamma``."""
    lengths, run = [], 0
    for hit in reversed(right):
        run = run + 1 if hit else 0
        lengths.append(min(run, gamma))
    return lengths[::-1]
