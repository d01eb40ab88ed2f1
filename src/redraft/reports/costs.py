"""Where a round's time goes, in units of what plain decoding takes for one token.

With t the seconds of one token of plain decoding, a round costs draft + verify + other + its share of prefill, and
yields tau tokens, so the speed-up is close to tau * t / cost (not equal: a response's first token comes from prefill
and belongs to no round). The ideal round verifies for the price of one plain token and has no other cost:
tau / (1 + gamma * c), where c = seconds of one draft step / t (speculative sampling, arXiv 2211.17192, theorem 3.8,
with measured times). Without a plain baseline the unit is a millisecond and there is no ideal.
"""

from __future__ import annotations

from dataclasses import dataclass

from redraft.reports.load import BenchResult, DraftResult


@dataclass(frozen=True)
class RoundCost:
    """One draft's mean round. The four costs are in units of ``unit_ms`` milliseconds.

    ``unit_ms`` is one token of plain decoding when ``relative``, else 1. ``stated_ideal`` is the result's own.
    """

    draft: float
    verify: float
    other: float
    prefill: float
    unit_ms: float
    relative: bool
    tau: float
    gamma: int | None
    stated_ideal: float | None = None

    @property
    def c(self) -> float | None:
        """Cost of one draft step in plain tokens; None without a baseline or a known number of steps."""
        return self.draft / self.gamma if self.relative and self.gamma else None

    @property
    def total(self) -> float:
        """Cost of a round, in the same unit as its parts."""
        return self.draft + self.verify + self.other + self.prefill

    @property
    def round_ms(self) -> float:
        """Milliseconds of a round."""
        return self.total * self.unit_ms

    @property
    def ideal(self) -> float | None:
        """Speed-up if verifying cost one plain token and nothing else cost anything: tau / (1 + gamma c)."""
        if self.stated_ideal is not None:
            return self.stated_ideal
        return self.tau / (1 + self.draft) if self.relative else None


def round_cost(result: BenchResult, draft: DraftResult) -> RoundCost | None:
    """The mean round of ``draft`` against the result's fastest plain decoding; None where it was not timed."""
    if draft.time is None:
        return None
    unit = 1 / result.plain.tokens_per_second.value if result.plain else 0.001
    a_round = draft.rounds * unit
    time = draft.time
    return RoundCost(
        draft=time.draft / a_round,
        verify=time.verify / a_round,
        other=time.other / a_round,
        prefill=time.prefill / a_round,
        unit_ms=1000 * unit,
        relative=result.plain is not None,
        tau=draft.tau_pooled.value,
        gamma=result.setup.gamma,
        stated_ideal=draft.ideal_speedup,
    )


def round_costs(result: BenchResult) -> dict[str, RoundCost]:
    """The mean round of every draft that was timed, by name."""
    found = {name: round_cost(result, draft) for name, draft in result.drafts.items()}
    return {name: cost for name, cost in found.items() if cost is not None}
