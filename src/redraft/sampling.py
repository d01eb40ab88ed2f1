"""The only place where logits are warped into probabilities.

Decoding, verification and regeneration all call :func:`warp`, so that a draft token is accepted against exactly
the distribution that plain decoding would have drawn from.

Shape legend: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redraft.settings.sampler import Sampler


def scale_logits(logits: Tensor, config: Any) -> Tensor:
    """What a head gives [..., V] -> the model's logits [..., V]: the factors and the soft cap that its config names."""
    for name in ("logit_scale", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def warp(logits_NV: Tensor, sampler: Sampler) -> Tensor:
    """Probabilities [N, V] in float32 after temperature, top-k and top-p, in that order.

    Greedy gives the one-hot of the argmax, so that every rule that is written for probabilities holds at
    temperature 0 too. Top-p keeps the smallest set whose mass reaches ``top_p`` and always the likeliest token.
    """
    if sampler.greedy:
        one_hot = torch.zeros(logits_NV.shape, dtype=torch.float32, device=logits_NV.device)
        return one_hot.scatter_(-1, logits_NV.argmax(-1, keepdim=True), 1.0)
    logits_NV = logits_NV.float() / sampler.temperature
    if sampler.top_k and sampler.top_k < logits_NV.shape[-1]:
        threshold = logits_NV.topk(sampler.top_k, dim=-1).values[..., -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < threshold, float("-inf"))
    probs_NV = logits_NV.softmax(-1)
    if sampler.top_p < 1:
        probs_NV = nucleus(probs_NV, sampler.top_p)
    return probs_NV


def nucleus(probs_NV: Tensor, mass: float, first: int = 64) -> Tensor:
    """Probabilities [N, V] of the likeliest tokens that together reach ``mass``, normalised; 0 for the others.

    A full sort of a vocabulary costs more than a small target's forward pass, and most rows reach ``mass`` within a
    few tokens: only those whose ``first`` likeliest fall short are looked at again, with sixteen times as many.
    """
    everything = first >= probs_NV.shape[-1]
    ordered, order = probs_NV.sort(-1, descending=True) if everything else probs_NV.topk(first, dim=-1)
    outside = ordered.cumsum(-1) - ordered >= mass
    kept_NV = torch.zeros_like(probs_NV).scatter_(-1, order, ordered.masked_fill(outside, 0.0))
    kept_NV = kept_NV / kept_NV.sum(-1, keepdim=True)
    short_N = ordered.sum(-1) < mass
    if not everything and bool(short_N.any()):
        kept_NV[short_N] = nucleus(probs_NV[short_N], mass, 16 * first)
    return kept_NV


def token_probability(logits_NV: Tensor, index_N: Tensor, sampler: Sampler) -> Tensor:
    """What :func:`warp` gives to one token of every row, [N], without making the rows of which the rest is not read."""
    if sampler.greedy or sampler.top_k:
        return warp(logits_NV, sampler).gather(-1, index_N.unsqueeze(-1)).squeeze(-1)
    logits_NV = logits_NV.float() / sampler.temperature
    total_N = logits_NV.logsumexp(-1)
    if sampler.top_p < 1:
        return _nucleus_probability(logits_NV, total_N, index_N, sampler.top_p)
    return (logits_NV.gather(-1, index_N.unsqueeze(-1)).squeeze(-1) - total_N).exp()


def _nucleus_probability(logits_NV: Tensor, total_N: Tensor, index_N: Tensor, mass: float, first: int = 64) -> Tensor:
    """As :func:`nucleus`: the ``first`` likeliest, and for the rows that fall short sixteen times as many."""
    everything = first >= logits_NV.shape[-1]
    ordered, order = logits_NV.sort(-1, descending=True) if everything else logits_NV.topk(first, dim=-1)
    ordered = (ordered - total_N.unsqueeze(-1)).exp()
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= mass, 0.0)
    found_N = kept.masked_fill(order != index_N.unsqueeze(-1), 0.0).sum(-1) / kept.sum(-1)
    short_N = ordered.sum(-1) < mass
    if not everything and bool(short_N.any()):
        rest = logits_NV[short_N], total_N[short_N], index_N[short_N]
        found_N[short_N] = _nucleus_probability(*rest, mass, 16 * first)
    return found_N


def draw(probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Token ids [N] by inversion of the cumulated probabilities with the given uniforms in [0, 1).

    Inversion needs one uniform a row, so a row's draw does not depend on what it is batched with. Tokens of
    probability zero are never drawn, whatever the rounding of the cumulated sum.
    """
    cumulated = probs_NV.double().cumsum(-1)
    target = uniform_N.double().unsqueeze(-1) * cumulated[..., -1:]
    chosen = torch.searchsorted(cumulated, target, right=True).clamp_(max=probs_NV.shape[-1] - 1)
    return chosen.squeeze(-1)
