"""How long things take here, and what a probe advises from that: leave the draft, try alignment, or align.

Speed is counted against the best of what can be served today: the old draft, or none where plain decoding is faster.
What alignment costs is paid back by the seconds that each served token is quicker (one request at a time).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from redraft.data.generate import Request, generate
from redraft.decode.auto import make_decoder
from redraft.decode.engine import PlainDecoder
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.reports.format import duration
from redraft.reports.tables import probe_panel
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape
from redraft.shown import Shown
from redraft.target import Target

# A draft that kept nine tenths of its accepted tokens is as good as on the day it was trained.
HEALTHY_SHARE = 0.9
# Alignment that makes serving less than a twentieth faster is not worth a maintainer's day.
WORTHWHILE_GAIN = 1.05
LEAVE, TRY, ADAPT = "leave", "try", "adapt"
ENDS = ("value", "low", "high")
# Answers that an adaptation trains on, as in the studies, and its passes over them.
ADAPT_ANSWERS, ADAPT_PASSES = 300, 6
# Decoded by each contestant to time a round; the first prompt warms up.
TIMED_PROMPTS, TIMED_TOKENS = 3, 40
# Tokens of the first batch, from which the time of the whole is told; answers that are written at once.
FIRST_TOKENS, WIDTH = 8, 64

Ends = Mapping[str, float]


@dataclass(frozen=True)
class RoundTime:
    """Measured seconds of a plain decoding step and of a round, each in the data type that it is fastest in."""

    plain: float
    round: float
    plain_type: str = ""
    round_type: str = ""

    @property
    def cost(self) -> float:
        """Plain steps that a round takes: the tau at which the draft begins to pay."""
        return self.round / self.plain

    def per_token(self, tau: float) -> float:
        """Seconds a served token at this tau, by the draft or without it, whichever is faster."""
        return min(self.plain, self.round / tau)


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
    verdict, words = "unknown", list[str]()
    if reference is not None and reference > 1:
        lost = 1 - (tau - 1) / (reference - 1)
        verdict = "healthy" if lost <= 1 - HEALTHY_SHARE else "stale"
        words += [f"{lost:.0%} of the accepted tokens are lost"] if verdict == "stale" else []
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
    slower = ", though most likely the draft stays slower than plain decoding" if forecast["value"] <= time.cost else ""
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


# -- all of it ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ProbeResult(Shown):
    """``tau`` and ``reference_tau`` with intervals, ``forecast`` of tau after alignment, ``gain`` in speed; speed-ups
    are predictions from timed rounds. ``adapt`` is whether alignment is worth a try."""

    verdict: str
    advice: str
    action: str
    adapt: bool
    prompts: int
    gamma: int
    tau: dict[str, float]
    reference_tau: dict[str, float] | None
    reference: str
    coverage: float | None
    trial_tau: dict[str, float] | None
    forecast: dict[str, float] | None
    forecast_from: str
    round_cost: float
    round_types: dict[str, str]
    speedup_now: float
    speedup_expected: float | None
    gain: dict[str, float] | None
    break_even: dict[str, Any] | None
    break_even_text: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Any:
        return probe_panel(self.verdict, self.lines(), self.action)

    def lines(self) -> dict[str, str]:
        """The figures as label and text, for the terminal."""
        found = {
            "acceptance length": f"{_interval(self.tau)} (greedy chain of {self.gamma}, {self.prompts} prompts)",
            "reference": f"{_interval(self.reference_tau)} {self.reference}" if self.reference_tau else self.reference,
        }
        if self.coverage is not None and self.coverage < 1:
            found["vocabulary"] = f"the draft can say {self.coverage:.0%} of the target's tokens"
        if self.trial_tau is not None:
            how = "on each half of the answers, trained on the other; too few to forecast by"
            found["trial adaptation"] = f"{_interval(self.trial_tau)} {how}"
        cost = f"a round costs {self.round_cost:.2f} plain steps"
        found["speed-up now"] = f"{self.speedup_now:.2f}x predicted{_slower(self.speedup_now)}; {cost}"
        if self.forecast is None:
            found["when aligned"] = self.forecast_from
        else:
            speed = {end: tau / self.round_cost for end, tau in self.forecast.items()}
            found["when aligned"] = f"acceptance length {_interval(self.forecast)}, {self.forecast_from}"
            found["speed-up when aligned"] = f"{_interval(speed, 'x')} predicted{_slower(speed['value'])}"
        if self.break_even_text:
            found["break-even"] = self.break_even_text
        return found | {"advice": self.advice}


def _interval(value: Mapping[str, float], unit: str = "") -> str:
    if value["low"] == value["high"]:
        return f"{value['value']:.2f}{unit}"
    return f"{value['value']:.2f}{unit} [{value['low']:.2f}, {value['high']:.2f}]"


def _slower(speedup: float) -> str:
    return ", slower than plain decoding" if speedup <= 1 else ""


# -- how long things take --------------------------------------------------------------------------------------------
def round_cost(targets: Mapping[str, Target], draft: Draft, prompts: Sequence[Prompt], gamma: int) -> RoundTime:
    """Measured seconds of a plain step and of a round (gamma drafted tokens and their verification).

    ``targets`` is the same model in the data types that it could be served in: plain decoding and the draft each count
    in the type that is fastest for it. Raises ``UserError`` when the answers are too short to time anything.
    """
    timed = {name: _timed(target, draft, prompts, gamma) for name, target in targets.items()}
    plain, chain = (min(timed, key=lambda name: timed[name][place]) for place in (0, 1))
    return RoundTime(timed[plain][0], timed[chain][1], plain, chain)


def _timed(target: Target, draft: Draft, prompts: Sequence[Prompt], gamma: int) -> tuple[float, float]:
    """Seconds of a plain step and of a round, of one target, decoded in turns."""
    plain, chain = PlainDecoder(target), make_decoder(target, draft, ChainShape(gamma))
    found = [(plain.generate(prompt.ids, TIMED_TOKENS), chain.generate(prompt.ids, TIMED_TOKENS)) for prompt in prompts]
    found = found[1:] or found  # the first is the warm-up
    steps, rounds = sum(len(a.ids) - 1 for a, _ in found), sum(len(b.rounds) for _, b in found)
    if not rounds or not steps:
        raise UserError("the target's answers are too short to time a round; give other prompts")
    return sum(a.decode_seconds for a, _ in found) / steps, sum(b.decode_seconds for _, b in found) / rounds


@dataclass(frozen=True)
class Pace:
    """How fast the target answers, from a first small batch: seconds of the prompts of ``batch`` answers together, of
    one token of one answer alone, and of one token of all of them."""

    batch: int
    prompts: float
    single: float
    step: float

    def token(self, length: float) -> float:
        """Seconds of a generated token of answers of ``length`` tokens, their prompts counted in, at full width.

        A step of more answers is taken to grow as it did from one answer to those of the first batch.
        """
        growth = max(0.0, self.step - self.single) / max(1, self.batch - 1)
        return (self.step + growth * (WIDTH - self.batch)) / WIDTH + self.prompts / self.batch / length


def first_batch(target: Target, prompts: Sequence[Prompt], max_new_tokens: int) -> Pace:
    """Time a few tokens of these prompts, at most :data:`WIDTH` at once."""

    def seconds(asked: Sequence[Prompt], tokens: int) -> float:
        began = time.perf_counter()
        for _ in generate(target, [Request(p.id, p.ids, Sampler()) for p in asked], tokens):
            pass
        return time.perf_counter() - began

    few, batch = max(1, min(FIRST_TOKENS, max_new_tokens - 1)), list(prompts[:WIDTH])
    seconds(batch[:1], 1 + few)  # warm-up
    single = (seconds(batch[:1], 1 + few) - seconds(batch[:1], 1)) / few
    first = seconds(batch, 1)
    step = (seconds(batch, 1 + few) - first) / few
    return Pace(len(batch), first, max(0.0, single), max(0.0, step))


def expected_seconds(
    pace: Pace, prompts: int, max_new_tokens: int, passes: int, types: int, training: float = 0.0
) -> float:
    """About how long a probe takes here.

    ``passes`` counts the targets that answer, ``types`` the data types that are timed, ``training`` what a token of a
    trial costs in all, in generated ones. Answers may end early: the true time is rather below.
    """
    timing = types * TIMED_PROMPTS * TIMED_TOKENS * 2 * pace.single
    trained = training * prompts * max_new_tokens * pace.token(max_new_tokens)
    answering = math.ceil(prompts / pace.batch) * (pace.prompts + pace.step * max_new_tokens)
    return passes * answering + timing + trained
