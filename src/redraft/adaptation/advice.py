"""What a probe advises: leave the draft, try alignment, or align, by what it would bring at both ends of the forecast.

Speed is counted against the best of what can be served today: the old draft, or none where plain decoding is faster.
What alignment costs is paid back by the seconds that each served token is quicker (one request at a time).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redraft.adaptation.pace import RoundTime
from redraft.reports.format import duration

# A draft that kept nine tenths of its accepted tokens is as good as on the day it was trained.
HEALTHY_SHARE = 0.9
# Alignment that makes serving less than a twentieth faster is not worth a maintainer's day.
WORTHWHILE_GAIN = 1.05
LEAVE, TRY, ADAPT = "leave", "try", "adapt"
ENDS = ("value", "low", "high")
# Answers that an adaptation trains on, as in the studies, and its passes over them.
ADAPT_ANSWERS, ADAPT_PASSES = 300, 6

Ends = Mapping[str, float]


@dataclass(frozen=True)
class Judgement:
    """``verdict`` on the draft as it is, ``action`` (leave, try, adapt) and the advice in words; ``gain`` is how many
    times as fast serving would be, with its interval."""

    verdict: str
    action: str
    advice: str
    gain: dict[str, float] | None


def judge(
    tau: float, reference: float | None, time: RoundTime, forecast: Ends | None, more: str = "redraft adapt measures it"
) -> Judgement:
    """``forecast`` is tau after alignment with its interval; ``more`` says how to learn more than it tells."""
    lost = None
    if reference is not None and reference > 1:
        lost = 1 - (tau - 1) / (reference - 1)
    if lost is None:
        verdict = "unknown"
    else:
        verdict = "healthy" if lost <= 1 - HEALTHY_SHARE else "stale"
    words = [f"{lost:.0%} of the accepted tokens are lost"] if lost is not None and verdict == "stale" else []
    gain = None if forecast is None else {end: time.per_token(tau) / time.per_token(forecast[end]) for end in ENDS}
    action, what = _action(time, forecast, gain, more)
    words.append(what)
    if tau <= time.cost:
        advice = "serve without a draft" + ("" if action == LEAVE else " until it is aligned")
        words.append(f"as it is, the draft is slower than plain decoding: {advice}")
    return Judgement(verdict, action, "; ".join(words), gain)


def _action(time: RoundTime, forecast: Ends | None, gain: Ends | None, more: str) -> tuple[str, str]:
    if forecast is None or gain is None:
        return TRY, f"try it: nobody can say what alignment would bring; {more}"
    if forecast["high"] <= time.cost:
        most = forecast["high"] / time.cost
        return LEAVE, f"leave it: aligned, the draft would still be slower than plain decoding (at most {most:.2f}x)"
    if gain["high"] < WORTHWHILE_GAIN:
        return LEAVE, f"leave it: alignment would make serving at most {gain['high']:.2f} times as fast"
    between = f"between {gain['low']:.2f} and {gain['high']:.2f} times as fast"
    if gain["low"] >= WORTHWHILE_GAIN:
        return ADAPT, f"adapt: alignment would make serving {between}"
    slower = ", most likely slower than plain decoding" if forecast["value"] <= time.cost else ""
    return TRY, f"try it: alignment would make serving {between}{slower}; {more}"


# -- what it costs, and when that is paid back -----------------------------------------------------------------------
@dataclass(frozen=True)
class BreakEven:
    """Seconds of an adaptation on this machine, and the served tokens that pay them back (infinite: never)."""

    seconds: float
    tokens: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, null for never."""
        return {"seconds": self.seconds, "tokens": {k: v if v < math.inf else None for k, v in self.tokens.items()}}

    def sentence(self) -> str:
        """For the terminal."""
        low, high = (rounded(self.tokens[end]) for end in ("low", "high"))
        cost = f"about {duration(self.seconds)} of adaptation"
        if self.tokens["low"] == math.inf:
            return f"{cost}, never paid back"
        until = f"{low} to {high}" if self.tokens["high"] < math.inf else f"{low} or more"
        return f"{cost}, paid back after {until} served tokens, one request at a time"


def rounded(tokens: float) -> str:
    """Two digits of a number of tokens: ``31,000``."""
    if not 0 < tokens < math.inf:
        return "0" if tokens <= 0 else "never"
    places = 1 - math.floor(math.log10(tokens))
    return f"{round(tokens, min(places, 0)):,.0f}"


def break_even(tau: float, time: RoundTime, forecast: Ends, seconds: float) -> BreakEven:
    """Served tokens after which ``seconds`` of adaptation are paid back, at the forecast and at its ends."""

    def needed(aligned: float) -> float:
        saved = time.per_token(tau) - time.per_token(aligned)
        return seconds / saved if saved > 0 else math.inf

    # The more alignment brings the sooner it is paid back.
    sources = {"value": "value", "low": "high", "high": "low"}
    return BreakEven(seconds, {name: needed(forecast[end]) for name, end in sources.items()})
