"""Bootstrap intervals: correct coverage, pairing, and the fast path equal to the general one."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.evaluate import statistics
from redraft.evaluate.statistics import Interval, bootstrap, paired_difference, paired_ratio


def measured(seed: int = 0, prompts: int = 40) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    rounds = random.integers(10, 60, prompts)
    return rounds * random.normal(2.0, 0.3, prompts), rounds


def test_fast_path_equals_the_general_bootstrap() -> None:
    tokens, rounds = measured()
    pairs = list(zip(tokens, rounds, strict=True))
    slow = bootstrap(pairs, lambda rows: sum(t for t, _ in rows) / sum(r for _, r in rows), draws=300, seed=4)
    fast = statistics.ratio_of_sums(tokens, rounds, draws=300, seed=4)
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high))


def test_reproducible_and_dependent_on_the_seed() -> None:
    tokens, rounds = measured()
    first, again, other = (statistics.ratio_of_sums(tokens, rounds, seed=s) for s in (1, 1, 2))
    assert first == again and first != other and first.value == other.value
    assert first.low < first.value < first.high


def test_the_interval_of_a_mean_has_the_textbook_width() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    interval = statistics.mean(values, draws=4000)
    half = 1.96 * values.std() / 400**0.5
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.08)


def test_coverage_over_repeated_experiments() -> None:
    inside = 0
    for seed in range(200):
        interval = statistics.mean(np.random.default_rng(1000 + seed).normal(0.0, 1.0, 60), draws=400, seed=seed)
        inside += interval.low <= 0.0 <= interval.high
    assert 175 <= inside <= 199  # 95% nominal


def test_pairing_removes_the_spread_that_both_share() -> None:
    tokens, rounds = measured()
    better = tokens * 1.1
    ratio = paired_ratio((better, rounds), (tokens, rounds))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    gain = paired_difference((better, rounds), (tokens, rounds))
    alone = statistics.ratio_of_sums(tokens, rounds)
    assert gain.low > 0.0 and gain.high - gain.low < 0.2 * (alone.high - alone.low)


def test_recovery_of_the_ends_is_zero_and_one() -> None:
    (stale, rounds), full = measured(), measured(seed=9)[0] + 30
    at_full = statistics.paired_recovery((full, rounds), (stale, rounds), (full, rounds))
    at_stale = statistics.paired_recovery((stale, rounds), (stale, rounds), (full, rounds))
    assert (at_full.low, at_full.high) == pytest.approx((1.0, 1.0))
    assert (at_stale.low, at_stale.high) == pytest.approx((0.0, 0.0))


def test_resamples_without_a_value_are_left_out() -> None:
    interval = statistics.ratio_of_sums([2.0, 0.0], [1.0, 0.0], draws=200)
    assert interval == Interval(2.0, 2.0, 2.0)


def test_one_prompt_gives_a_point_and_none_is_refused() -> None:
    assert statistics.mean([3.0]) == Interval(3.0, 3.0, 3.0)
    with pytest.raises(ValueError):
        bootstrap([], lambda rows: 0.0)
    assert Interval(1.0, 0.5, 2.0).to_dict() == {"value": 1.0, "low": 0.5, "high": 2.0}
