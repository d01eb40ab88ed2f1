"""Figures of contestants by hand: what counts in tau, pairs of contestants, and totals without intervals."""

from __future__ import annotations

import pytest

from redraft.evaluate.figures import Tally, by_task, gains

PLAIN = Tally([10, 20, 30], [1.0, 2.0, 3.0], [9, 19, 29], [0, 0, 0])
OLD = Tally([10, 20, 30], [1.0, 1.0, 1.0], [9, 19, 29], [3, 0, 10])
NEW = Tally([10, 20, 30], [0.5, 0.5, 0.5], [9, 19, 29], [3, 8, 5])


def test_a_prompt_without_rounds_counts_in_speed_and_in_no_tau() -> None:
    assert OLD.rate()["value"] == pytest.approx(60 / 3)
    assert OLD.tau()["value"] == pytest.approx(38 / 13)
    assert OLD.tau_macro()["value"] == pytest.approx((9 / 3 + 29 / 10) / 2)
    assert OLD.speedup(PLAIN)["value"] == pytest.approx(2.0)
    low, high = OLD.speedup(PLAIN)["low"], OLD.speedup(PLAIN)["high"]
    assert low is not None and high is not None and low < 2.0 < high


def test_totals_have_no_interval() -> None:
    whole = Tally([60], [3.0], [38], [13], whole=True)
    assert whole.tau() == {"value": pytest.approx(38 / 13), "low": None, "high": None}
    assert whole.speedup(Tally([60], [6.0], [0], [0], whole=True)) == {"value": 2.0, "low": None, "high": None}
    assert whole.part([0]).whole


def test_tasks_without_a_round_are_left_out() -> None:
    found = by_task(OLD, PLAIN, ["a", "b", "a"], ["b", "a"])
    assert list(found) == ["a"] and found["a"]["prompts"] == 2
    assert found["a"]["tau_pooled"]["value"] == pytest.approx(38 / 13)
    assert found["a"]["plain_tokens_per_second"]["value"] == pytest.approx(10.0)
    assert "speedup" not in by_task(OLD, None, ["a"] * 3, ["a"])["a"]


def test_a_gain_in_tau_is_over_the_prompts_on_which_both_drafted() -> None:
    found = gains({"old": OLD, "new": NEW})
    assert list(found) == ["new over old"]
    assert found["new over old"]["tau"]["value"] == pytest.approx(38 / 8 - 38 / 13)
    assert found["new over old"]["speed"]["value"] == pytest.approx(2.0)
    assert gains({"old": OLD}) == gains({}) == {}
