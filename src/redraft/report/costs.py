"""Where a round's time goes, in units of what plain decoding takes for one token.

With t the seconds of one token of plain decoding, a round costs draft + verify + other + its share of prefill, and
yields tau tokens, so the speed-up is close to tau * t / cost (not equal: a response's first token comes from prefill
and belongs to no round). The ideal round verifies for the price of one plain token and has no other cost:
tau / (1 + gamma * c), where c = seconds of one draft step / t (speculative sampling, arXiv 2211.17192, theorem 3.8,
with measured times).
"""

from __future__ import annotations

from dataclasses import dataclass

from redraft.report.load import BenchResult, DraftResult


@dataclass(frozen=True)
class RoundCost:
    """One draft's mean round. The four costs are in plain tokens; ``round_ms`` is milliseconds."""

    draft: float
    verify: float
    other: float
    prefill: float
    round_ms: float
    tau: float
    gamma: int

    @property
    def c(self) -> float:
        """Cost of one draft step in plain tokens."""
        return self.draft / self.gamma

    @property
    def total(self) -> float:
        """Cost of a round in plain tokens."""
        return self.draft + self.verify + self.other + self.prefill

    @property
    def ideal(self) -> float:
        """Speed-up if verifying cost one plain token and nothing else cost anything: tau / (1 + gamma c)."""
        return self.tau / (1 + self.draft)


def round_cost(result: BenchResult, draft: DraftResult) -> RoundCost:
    """The mean round of ``draft`` against the fastest plain decoding of the same result."""
    step = 1 / result.plain.tokens_per_second.value
    a_round = draft.rounds * step
    time = draft.time
    return RoundCost(
        draft=time.draft / a_round,
        verify=time.verify / a_round,
        other=time.other / a_round,
        prefill=time.prefill / a_round,
        round_ms=1000 * (time.draft + time.verify + time.other + time.prefill) / draft.rounds,
        tau=draft.tau_pooled.value,
        gamma=result.setup.gamma,
    )
