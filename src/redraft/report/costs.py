"""Where a round's time goes, in units of one plain decoding step.

With t the seconds of one plain step, a round costs draft + verify + other seconds and yields tau tokens, so the
speed-up is tau * t / (draft + verify + other). The ideal round verifies for the price of one plain step and has
no other cost: tau / (1 + gamma * c), where c = seconds of one draft step / t (speculative sampling, arXiv
2211.17192, theorem 3.8, with measured times).
"""

from __future__ import annotations

from dataclasses import dataclass

from redraft.report.load import BenchResult, DraftResult


@dataclass(frozen=True)
class RoundCost:
    """One draft's mean round. The three costs are in plain steps; ``round_ms`` is milliseconds."""

    draft: float
    verify: float
    other: float
    round_ms: float
    tau: float
    gamma: int

    @property
    def c(self) -> float:
        """Cost of one draft step in plain steps."""
        return self.draft / self.gamma

    @property
    def total(self) -> float:
        """Cost of a round in plain steps."""
        return self.draft + self.verify + self.other

    @property
    def ideal(self) -> float:
        """Speed-up if verifying cost one plain step and nothing else cost anything: tau / (1 + gamma c)."""
        return self.tau / (1 + self.draft)


def round_cost(result: BenchResult, draft: DraftResult) -> RoundCost:
    """The mean round of ``draft`` against the fastest plain step of the same result."""
    step = 1 / result.plain.tokens_per_second.value
    a_round = draft.rounds * step
    time = draft.time
    return RoundCost(
        draft=time.draft / a_round,
        verify=time.verify / a_round,
        other=time.other / a_round,
        round_ms=1000 * (time.draft + time.verify + time.other) / draft.rounds,
        tau=draft.tau_pooled.value,
        gamma=result.setup.gamma,
    )
