"""How the target samples: one definition, of settings and of decoding alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from redraft.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """A sampling rule. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 switch those filters off.

    Raises ``UserError`` when a value lies outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (greedy) or above, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 (off) or above, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must lie in (0, 1], not {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def describe(self) -> str:
        """The name that goes beside every published figure."""
        if self.greedy:
            return "greedy"
        parts = [f"temperature {self.temperature:g}"]
        if self.top_k:
            parts.append(f"top-k {self.top_k}")
        if self.top_p < 1:
            parts.append(f"top-p {self.top_p:g}")
        return ", ".join(parts)


def samplers_of(temperatures: Sequence[float], top_p: float = 1.0, top_k: int = 0) -> list[Sampler]:
    """The samplers of several temperatures; filters are for those that draw.

    Raises ``UserError`` for no temperature, for one that is there twice and for values out of range.
    """
    Sampler(1.0, top_k, top_p)
    if not temperatures or len({f"{t:g}" for t in temperatures}) < len(temperatures):
        given = ", ".join(f"{t:g}" for t in temperatures) or "none"
        raise UserError(f"give at least one temperature, and every temperature once, not {given}")
    return [Sampler(t, top_k if t else 0, top_p if t else 1.0) for t in temperatures]


def asked_samplers(temperatures: Sequence[float], top_p: float = 1.0, top_k: int = 0) -> list[Sampler]:
    """:func:`samplers_of`, where filters that nothing is drawn through are a mistake. Raises ``UserError``."""
    if not any(temperatures) and (top_k or top_p != 1):
        raise UserError("temperature 0 is greedy and leaves nothing to filter; drop --top-k and --top-p or raise it")
    return samplers_of(temperatures, top_p, top_k)
