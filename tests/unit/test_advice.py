"""What a probe advises, and when an adaptation is paid back."""

from __future__ import annotations

import math

import pytest

from redraft.adaptation.advice import WORTHWHILE_GAIN, RoundTime, break_even, judge, rounded

TIME = RoundTime(plain=0.04, round=0.06)  # a draft pays from a tau of 1.5 on


def ends(low: float, value: float, high: float) -> dict[str, float]:
    return {"low": low, "value": value, "high": high}


def test_a_draft_is_left_only_where_the_upper_end_is_not_worth_it() -> None:
    left = judge(2.0, 2.05, TIME, ends(2.0, 2.04, 2.08))
    assert (left.verdict, left.action) == ("healthy", "leave") and "at most 1.04 times as fast" in left.advice
    # Healthy, and yet there may be something to win.
    tried = judge(2.0, 2.05, TIME, ends(2.0, 2.04, 2.2), "--trial may narrow this")
    assert (tried.verdict, tried.action) == ("healthy", "try")
    assert "try it: alignment would make serving between 1.00 and 1.10 times as fast" in tried.advice
    assert "--trial may narrow this" in tried.advice


def test_a_gain_that_is_sure_is_advised() -> None:
    found = judge(1.6, 2.0, TIME, ends(2.0, 2.2, 2.4))
    assert (found.verdict, found.action) == ("stale", "adapt")
    assert "40% of the accepted tokens are lost" in found.advice and "between 1.25 and 1.50 times" in found.advice
    assert found.gain == pytest.approx(ends(1.25, 1.375, 1.5))


def test_the_threshold_is_the_upper_end() -> None:
    just = 2.0 * WORTHWHILE_GAIN
    assert judge(2.0, None, TIME, ends(2.0, 2.05, just * 1.001)).action == "try"
    assert judge(2.0, None, TIME, ends(2.0, 2.05, just * 0.999)).action == "leave"


def test_slower_than_plain_decoding_is_called_so() -> None:
    """Gains count against plain decoding where that is what would be served."""
    found = judge(1.2, None, TIME, ends(1.3, 1.8, 2.1))
    assert found.verdict == "unknown" and "slower than plain decoding: serve without a draft until" in found.advice
    assert found.gain == pytest.approx(ends(1.0, 1.2, 1.4))
    never = judge(1.2, None, TIME, ends(1.25, 1.3, 1.4))
    assert never.action == "leave" and "would still be slower than plain decoding (at most 0.93x)" in never.advice
    doubtful = judge(1.2, None, TIME, ends(1.3, 1.45, 2.1))
    assert doubtful.action == "try" and "most likely the draft stays slower than plain decoding" in doubtful.advice


def test_without_evidence_nothing_is_promised() -> None:
    found = judge(2.0, None, TIME, None)
    assert found.action == "try" and found.gain is None and "nobody can say" in found.advice


# -- paid back -------------------------------------------------------------------------------------------------------
def test_an_adaptation_is_paid_back_by_the_seconds_of_each_token() -> None:
    # 0.03 s a token before, 0.02 s and 0.024 s after.
    found = break_even(2.0, TIME, ends(2.0, 2.5, 3.0), 600.0)
    assert found.tokens["value"] == pytest.approx(600 / 0.006) and found.tokens["low"] == pytest.approx(600 / 0.01)
    assert found.tokens["high"] == math.inf and "60,000 or more served tokens" in found.sentence()
    assert found.to_dict()["tokens"]["high"] is None
    sure = break_even(2.0, TIME, ends(2.4, 2.5, 3.0), 600.0)
    assert "10 min 0 s of adaptation, paid back after 60,000 to 120,000 served tokens" in sure.sentence()


def test_what_plain_decoding_does_is_not_paid_for() -> None:
    """A draft that stays slower than plain decoding saves nothing, however much it gained."""
    found = break_even(1.1, TIME, ends(1.2, 1.3, 1.4), 600.0)
    assert set(found.tokens.values()) == {math.inf} and "never paid back" in found.sentence()
    # Beside plain decoding, which is what would be served today, and not beside the old draft.
    assert break_even(1.1, TIME, ends(2.0, 2.0, 2.0), 1.0).tokens["value"] == pytest.approx(1 / (0.04 - 0.03))


@pytest.mark.parametrize(("tokens", "text"), [(31_415, "31,000"), (987, "990"), (7.2, "7"), (1.26e6, "1,300,000")])
def test_tokens_are_told_in_two_digits(tokens: float, text: str) -> None:
    assert rounded(tokens) == text
