"""What a target is asked, and what comes back: token ids in, token ids out.

Shape legend: P prompt tokens, R response tokens, H hidden size, K taps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.settings.sampler import Sampler


@dataclass(frozen=True)
class Request:
    """One prompt to be answered: its key, its token ids and the sampling rule."""

    key: str
    prompt_ids: Sequence[int]
    sampler: Sampler
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """The answer to a request. ``finish_reason`` is ``stop`` (an end token, kept in the ids) or ``length``.

    ``features``, where they were asked for: taps [P + R - 2, K*H] and final-norm states [R - 1, H] of the positions
    that :mod:`redraft.features` names; none for an answer of one token.
    """

    request: Request
    response_ids: list[int]
    finish_reason: str
    features: tuple[Tensor, Tensor] | None = None


def request_uniforms(request: Request, count: int) -> Tensor:
    """The uniforms [count] that a request draws with: a function of its key, sampler and seed alone."""
    text = f"{request.key}|{request.sampler}|{request.seed}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
