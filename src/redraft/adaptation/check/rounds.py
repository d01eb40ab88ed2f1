"""Rounds of a chain over stored greedy answers, prompt by prompt, and what two ways of drafting differ by.

Every round counts in full, as engines count: rounds start where the answer still had tokens to come, and the answers
are longer than that by a round.

Shape legend: P prompts, D bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redraft.evaluate.statistics import Interval, ratio_of_sums, resample_counts
from redraft.features import FeatureSource
from redraft.rows import TokenRow, anchors

# A change is a cause where it wins back this much: of the accepted tokens, and in tau; and where no more than this
# share of resamples says that it wins nothing. Dozens of changes are tried, so the share is far below a twentieth.
LEAST_SHARE, LEAST_TAU, CHANCE = 0.12, 0.1, 0.002
DRAWS = 4000


@dataclass(frozen=True)
class Round:
    """It starts behind the position ``at`` of the whole text; ``accepted`` of its drafted tokens were kept."""

    at: int
    accepted: int


@dataclass
class Rounds:
    """The rounds of every prompt, by key, of chains of ``gamma``."""

    gamma: int
    by_key: dict[str, list[Round]] = field(default_factory=dict)

    def counts(self, keys: Sequence[str]) -> tuple[list[int], list[int]]:
        """Tokens and rounds of these prompts, the corrected or bonus token of every round counted."""
        found = [self.by_key[key] for key in keys]
        return [sum(r.accepted + 1 for r in rounds) for rounds in found], [len(rounds) for rounds in found]

    @property
    def keys(self) -> list[str]:
        """The prompts that have a round."""
        return [key for key, rounds in self.by_key.items() if rounds]

    def tau(self, keys: Sequence[str] | None = None) -> Interval:
        """tau_pooled with its interval over prompts."""
        return ratio_of_sums(*self.counts(self.keys if keys is None else keys))

    def only(self, first: int, last: int | None = None) -> Rounds:
        """The rounds that start behind positions of the text from ``first`` up to ``last``, not counted in."""
        end = last if last is not None else 10**9
        return Rounds(self.gamma, {key: [r for r in rs if first <= r.at < end] for key, rs in self.by_key.items()})

    def accepted(self) -> list[int]:
        """Tokens accepted at each drafted position."""
        every = [r.accepted for rounds in self.by_key.values() for r in rounds]
        return [sum(a > j for a in every) for j in range(self.gamma)]

    def conditional(self) -> list[float | None]:
        """Acceptance at each drafted position, given that it was reached; None where none was."""
        total = sum(len(rounds) for rounds in self.by_key.values())
        reached = [total, *self.accepted()]
        return [new / old if old else None for old, new in zip(reached, reached[1:], strict=False)]


def rounds_of(
    draft: Any,
    target: Any,
    rows: Sequence[TokenRow],
    features: FeatureSource | None,
    gamma: int,
    limits: Mapping[str, int],
) -> Rounds:
    """Walk a draft over greedy answers. ``limits`` are the tokens of an answer that a server would have given; rounds
    start while there are fewer."""
    found: dict[str, list[Round]] = {}
    with torch.inference_mode():
        for row, runs in draft.walk(target).runs(rows, features, gamma):
            at, rounds, most = 0, list[Round](), min(anchors(row), limits[row.key] - 1)
            while at < most:
                rounds.append(Round(len(row.prompt_ids) + at, runs[at]))
                at += runs[at] + 1
            found[row.key] = rounds
    return Rounds(gamma, dict(sorted(found.items())))


def gain(new: Any, old: Any, keys: Sequence[str], share: float = LEAST_SHARE) -> tuple[float, bool]:
    """What tau rises by from ``old`` to ``new`` on these prompts, and whether that is sure and much: at least this
    ``share`` of the accepted tokens. Both tell the tokens and rounds of prompts, as :meth:`Rounds.counts` does."""
    columns = np.array([*new.counts(keys), *old.counts(keys)], dtype=np.float64).T
    if not len(keys) or not columns[:, 1].sum() or not columns[:, 3].sum():
        return 0.0, False
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn_D = _difference(resample_counts(len(keys), DRAWS, 0) @ columns)
    value, base = float(_difference(columns.sum(0))), float(columns[:, 2].sum() / columns[:, 3].sum())
    sure = bool(np.nanmean(drawn_D <= 0) <= CHANCE)
    return value, sure and value >= LEAST_TAU and value >= share * (base - 1)


def _difference(sums: Any) -> Any:
    return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]


class Tapped:
    """Features at some of the layers that ``source`` has, in any order (:class:`redraft.features.FeatureSource`)."""

    def __init__(self, source: FeatureSource, have: Sequence[int], width: int, wanted: Sequence[int]) -> None:
        """``have`` are the layers of the source, each of this ``width``; ``wanted`` are among them."""
        self.source, self.width, self.have = source, width, len(have)
        self.places = [list(have).index(k) for k in wanted]

    def get(self, row: TokenRow) -> tuple[Tensor, Tensor]:
        taps, hidden = self.source.get(row)
        parts = taps.view(len(taps), self.have, self.width)[:, self.places]
        return parts.flatten(1), hidden
