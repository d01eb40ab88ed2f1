"""One request on its way through a decoder: what is asked for, what is held meanwhile, and what comes back.

Shape legend: T new tokens, K*F taps side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from redraft.target import Target


@dataclass
class Round:
    """One proposal and its verification.

    ``proposed`` are all proposed tokens, a tree's level by level; ``kept`` the ``accepted`` ones and one more, cut by
    the stop rule. ``overlap`` is sum_x min(target, draft) at each drafted position of a chain. ``depth`` is how many
    tokens could have been accepted (a tree's longest path), ``full`` whether the accepted path ended in a leaf, which
    makes the token after it a bonus and no correction.
    """

    proposed: list[int]
    accepted: int
    kept: list[int]
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    overlap: list[float] = field(default_factory=list)
    depth: int = 0
    full: bool = False

    def __post_init__(self) -> None:
        if not self.depth:
            self.depth = len(self.proposed)
        self.full = self.full or self.accepted == self.depth


@dataclass
class Generation:
    """Response ids (the end token included), how it ended, what it took, and the rounds where there were any."""

    ids: list[int]
    finish_reason: str
    prefill_seconds: float
    decode_seconds: float
    rounds: list[Round] = field(default_factory=list)


OnRound = Callable[[Round], None]


class Uniforms:
    """The uniforms in [0, 1) of one request: one stream, whatever the portions in which it is taken."""

    BLOCK = 256

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.block, self.at = self.fresh(self.BLOCK), 0

    def fresh(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64).to(self.device)

    def take(self, count: int) -> Tensor:
        if self.at + count > len(self.block):
            blocks = -(-count // self.BLOCK)
            more = [self.fresh(self.BLOCK) for _ in range(blocks)]
            self.block, self.at = torch.cat([self.block[self.at :], *more]), 0
        self.at += count
        return self.block[self.at - count : self.at]

    def put_back(self, count: int) -> None:
        """Return the last ``count`` uniforms of the portion just taken: nothing was decided with them."""
        self.at -= count


@dataclass
class Request:
    """A prompt that is being decoded: its limit and its random numbers, the target's cache, the draft's proposer, the
    response so far, and what was verified since the draft last proposed.

    ``new_ids_T`` [T] and ``new_taps_T`` [T, K*F] are as :mod:`redraft.drafts.proposing` has them.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    uniforms: Uniforms
    cache: Any
    proposer: Any
    ids: list[int]
    new_ids_T: Tensor
    new_taps_T: Tensor

    @property
    def room(self) -> int:
        """How many tokens the response may still get."""
        return self.max_new_tokens - len(self.ids)


def check_room(target: Target, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    """Raise ``ValueError`` when prompt and response do not fit the context."""
    if not prompt_ids or max_new_tokens < 1 or len(prompt_ids) + max_new_tokens > target.context:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} and a response of {max_new_tokens} tokens do not fit "
            f"a context of {target.context}"
        )


def trim(ids: list[int], ends: frozenset[int], room: int) -> tuple[list[int], str | None]:
    """The tokens up to an end token or the limit, and the reason if one of them struck."""
    for i, token in enumerate(ids[:room]):
        if token in ends:
            return ids[: i + 1], "stop"
    return (ids[:room], "length") if len(ids) >= room else (ids, None)
