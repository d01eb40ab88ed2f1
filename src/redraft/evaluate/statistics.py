"""Bootstrap intervals over prompts.

Prompts, not rounds, are resampled: the rounds of one response depend on each other. Whatever is compared (drafts
with each other, a draft with plain decoding) is measured on the same prompts and resampled together, so the
interval of a difference or ratio is the paired one.

Shape legend: D bootstrap draws, P prompts, F measured quantities of one prompt (tokens, rounds, seconds, ...).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Pairs = tuple[npt.ArrayLike, npt.ArrayLike]
"""Numerators and denominators of a ratio, an entry each a prompt."""
T = TypeVar("T")
LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Interval:
    """A statistic on the sample itself and the bounds of its percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """{"value", "low", "high"} as plain floats, the form of result files; null for an end that is not there."""
        ends = {"low": self.low, "high": self.high}
        return {"value": self.value, **{name: end if math.isfinite(end) else None for name, end in ends.items()}}


def resample_counts(prompts: int, draws: int, seed: int) -> Array:
    """How often each prompt occurs in each resample [D, P]; a function of the three arguments alone.

    The same seed gives the same resamples, so statistics that are computed in separate calls are still paired.
    """
    if prompts < 1:
        raise ValueError("a bootstrap needs at least one prompt")
    even = np.full(prompts, 1 / prompts)
    return np.random.default_rng(seed).multinomial(prompts, even, size=draws).astype(np.float64)


def _interval(value: float, drawn_D: Array) -> Interval:
    """Percentiles of the finite draws: a resample whose statistic does not exist (0/0) says nothing about it."""
    finite = drawn_D[np.isfinite(drawn_D)]
    if not finite.size:
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def bootstrap(
    values_per_prompt: Sequence[T],
    statistic: Callable[[list[T]], float],
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (Efron 1979) of any statistic of a list with one entry a prompt.

    Entries may be anything, for instance a pair of measurements of two drafts: they are resampled whole, hence
    paired. With one prompt the interval is a point and says nothing. Raises ``ValueError`` for no prompts.
    """
    values = list(values_per_prompt)
    counts_DP = resample_counts(len(values), draws, seed).astype(np.int64)
    everyone = np.arange(len(values))
    drawn = [statistic([values[i] for i in np.repeat(everyone, counts_P)]) for counts_P in counts_DP]
    return _interval(statistic(values), np.asarray(drawn, dtype=np.float64))


def of_ratios(statistic: Callable[..., Any], *pairs_P: Pairs, draws: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap of a function of ratios of sums over prompts, from numerators and denominators on the same prompts.

    Only sums are resampled: one matrix product, no loop, and the same resamples as :func:`bootstrap` at the same seed.
    """
    values_PF = np.column_stack([column for pair in pairs_P for column in pair]).astype(np.float64)
    counts_DP = resample_counts(len(values_PF), draws, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn, value = (
            statistic(*(sums[..., 2 * i] / sums[..., 2 * i + 1] for i in range(len(pairs_P))))
            for sums in (counts_DP @ values_PF, values_PF.sum(0))
        )
    return _interval(value, drawn)


def ratio_of_sums(numerator_P: npt.ArrayLike, denominator_P: npt.ArrayLike, **options: Any) -> Interval:
    """sum(numerator) / sum(denominator): ``tau_pooled`` from tokens and rounds, tokens/s from tokens and seconds."""
    return of_ratios(lambda ratio: ratio, (numerator_P, denominator_P), **options)


def mean(values_P: npt.ArrayLike, **options: Any) -> Interval:
    """Mean over prompts; ``tau_macro`` from each prompt's tokens / rounds."""
    return ratio_of_sums(values_P, np.ones(len(np.asarray(values_P))), **options)


def paired_difference(new_P: Pairs, old_P: Pairs, **options: Any) -> Interval:
    """Ratio of sums of ``new`` minus that of ``old``; each is (numerators, denominators) on the same prompts."""
    return of_ratios(operator.sub, new_P, old_P, **options)


def paired_ratio(new_P: Pairs, old_P: Pairs, **options: Any) -> Interval:
    """Ratio of sums of ``new`` over that of ``old``: a speed-up, from (tokens, seconds) of each on the same prompts."""
    return of_ratios(operator.truediv, new_P, old_P, **options)


def paired_recovery(new_P: Pairs, stale_P: Pairs, full_P: Pairs, **options: Any) -> Interval:
    """Share of the gap to full retraining that was won back, (tau - tau_stale) / (tau_full - tau_stale) of pooled tau.

    From (tokens, rounds) of the three drafts on the same prompts; above 1 where it beats full retraining. The
    denominator may come near zero in some resamples when full retraining gains little: the interval is wide then.
    """
    return of_ratios(lambda tau, stale, full: (tau - stale) / (full - stale), new_P, stale_P, full_P, **options)
