"""``redraft probe``: is the present draft healthy or stale, what would alignment bring, is it worth doing?

The target answers a few prompts greedily (batched), the draft's rounds are walked over the features that passed by
on the way, and two short decodings time a round. The reference is the same draft on the target it was made for.
Drafts of every family are probed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redraft.data.generate import Request, generate
from redraft.data.regenerate import Kept
from redraft.data.store import Row
from redraft.decode import make_decoder
from redraft.decode.engine import PlainDecoder
from redraft.decode.tree import ChainShape
from redraft.drafts.base import Proposer
from redraft.drafts.standalone import StandaloneDraft
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt, tau_interval
from redraft.sampling import Sampler
from redraft.target import Target
from redraft.teacher.features import FeatureStore, anchors
from redraft.teacher.simulate import simulate_greedy_chain
from redraft.teacher.standalone import simulate_greedy_standalone

# A draft that kept nine tenths of its accepted tokens is as good as on the day it was trained.
HEALTHY_SHARE = 0.9
# Alignment that makes serving less than a twentieth faster is not worth a maintainer's day.
WORTHWHILE_GAIN = 1.05


@dataclass(frozen=True)
class ProbeResult:
    """``tau`` and ``reference_tau`` with intervals; speed-ups are predictions from timed rounds."""

    verdict: str
    advice: str
    adapt: bool
    prompts: int
    gamma: int
    tau: dict[str, float]
    reference_tau: dict[str, float] | None
    reference: str
    round_cost: float
    speedup_now: float
    speedup_expected: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> dict[str, str]:
        """The figures as label and text, for the terminal."""
        found = {
            "acceptance length": f"{_interval(self.tau)} (greedy chain of {self.gamma}, {self.prompts} prompts)",
            "reference": f"{_interval(self.reference_tau)} {self.reference}" if self.reference_tau else self.reference,
            "speed-up now": f"{self.speedup_now:.2f}x predicted; a round costs {self.round_cost:.2f} plain steps",
        }
        if self.speedup_expected is not None:
            found["speed-up when aligned"] = f"{self.speedup_expected:.2f}x predicted, if the reference is reached"
        return found | {"advice": self.advice}


def _interval(value: dict[str, float]) -> str:
    if value["low"] == value["high"]:
        return f"{value['value']:.2f}"
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def greedy_rows(
    target: Target,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    progress: Callable[..., None] | None = None,
    store: FeatureStore | None = None,
) -> list[Row]:
    """The target's greedy answers, those left out that have no position to be measured at.

    ``store`` takes the features that the target computes on the way.
    """
    requests = [Request(p.id, p.ids, Sampler()) for p in prompts]
    rows, kept, tokens = list[Row](), list[Kept](), 0
    for done in generate(target, requests, max_new_tokens, features=store is not None):
        texts = (done.request.key, list(done.request.prompt_ids), done.response_ids)
        row = Row(*texts, 0.0, 0, 1.0, 0, done.finish_reason, "")
        rows.append(row)
        if done.features:
            kept.append((row, *done.features))
        tokens += len(done.response_ids)
        if progress:
            progress(len(rows), tokens=tokens)
    if store is not None:
        store.put(kept)
    return [row for row in rows if anchors(row)]


@contextmanager
def greedy_answers(
    target: Target,
    draft: Proposer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    progress: Callable[..., None] | None = None,
) -> Iterator[tuple[list[Row], FeatureStore | None]]:
    """The target's greedy answers and their features; none of those for a standalone draft, which reads text alone."""
    if isinstance(draft, StandaloneDraft):
        yield greedy_rows(target, prompts, max_new_tokens, progress), None
        return
    target.tap(draft.config.taps)
    with tempfile.TemporaryDirectory(prefix="redraft-probe-", ignore_cleanup_errors=True) as folder:
        store = FeatureStore(Path(folder), {})
        rows = greedy_rows(target, prompts, max_new_tokens, progress, store)
        store.build(target, rows)  # nothing, unless the disk was too full to keep them
        yield rows, store


def acceptance(
    target: Target,
    draft: Proposer,
    prompts: Sequence[Prompt],
    gamma: int,
    max_new_tokens: int,
    progress: Callable[..., None] | None = None,
) -> dict[str, float]:
    """tau_pooled with its interval of the greedy chain on the target's own greedy answers, without decoding.

    Raises ``UserError`` when no answer has two tokens.
    """
    draft = draft.to(target.device)
    with greedy_answers(target, draft, prompts, max_new_tokens, progress) as (rows, store):
        if not rows:
            raise UserError("the target ends every answer at once; check its chat template and end token")
        if isinstance(draft, StandaloneDraft):
            accepted = simulate_greedy_standalone(draft, target, rows, gamma)
        else:
            assert store is not None
            accepted = simulate_greedy_chain(draft, target, rows, store, gamma)
    return tau_interval(accepted, {row.key: anchors(row) for row in rows})


def round_cost(target: Target, draft: Proposer, prompts: Sequence[Prompt], gamma: int, tokens: int = 40) -> float:
    """Measured time of one round (gamma drafted tokens and their verification) over one plain decoding step."""
    plain, chain = PlainDecoder(target), make_decoder(target, draft, ChainShape(gamma))
    plain_seconds = plain_steps = chain_seconds = rounds = 0.0
    for index, prompt in enumerate(prompts):
        a, b = plain.generate(prompt.ids, tokens), chain.generate(prompt.ids, tokens)
        if index == 0 and len(prompts) > 1:
            continue  # warm-up
        plain_seconds, plain_steps = plain_seconds + a.decode_seconds, plain_steps + len(a.ids) - 1
        chain_seconds, rounds = chain_seconds + b.decode_seconds, rounds + len(b.rounds)
    if not rounds or not plain_steps:
        raise UserError("the target's answers are too short to time a round; give other prompts")
    return (chain_seconds / rounds) / (plain_seconds / plain_steps)


def probe(
    target: Target,
    draft: Proposer,
    prompts: Sequence[Prompt],
    gamma: int,
    max_new_tokens: int = 128,
    base_target: Target | None = None,
    known_reference: dict[str, float] | None = None,
    progress: Callable[..., None] | None = None,
) -> ProbeResult:
    """Measure and judge. ``known_reference`` is the tau that the draft's own record states, used without a base."""
    tau = acceptance(target, draft, prompts, gamma, max_new_tokens, progress)
    cost = round_cost(target, draft, prompts[:3], gamma)
    reference, where = known_reference, "stated by the draft's own record, on other prompts"
    if base_target is not None:
        reference = acceptance(base_target, draft, prompts, gamma, max_new_tokens, progress)
        where = "on the base target's own answers to the same prompts"
    if reference is None:
        where = "none: give --base-target to learn what the draft could reach"
    verdict, advice, adapt, expected = judge(tau["value"], reference["value"] if reference else None, cost)
    return ProbeResult(
        verdict=verdict,
        advice=advice,
        adapt=adapt,
        prompts=len(prompts),
        gamma=gamma,
        tau=tau,
        reference_tau=reference,
        reference=where,
        round_cost=cost,
        speedup_now=tau["value"] / cost,
        speedup_expected=expected,
    )


def judge(tau: float, reference: float | None, cost: float) -> tuple[str, str, bool, float | None]:
    """(verdict, advice, whether to adapt, expected speed-up when aligned)."""
    if reference is None:
        if tau <= cost:
            return "slower than plain decoding", "adapt, or serve without a draft", True, None
        return "unknown", "the draft pays off now; without a reference nobody can say how much was lost", False, None
    share = (tau - 1) / (reference - 1) if reference > 1 else 1.0
    expected = max(tau, reference) / cost
    if share >= HEALTHY_SHARE:
        return "healthy", "leave the draft as it is", False, expected
    gain = reference / tau
    lost = f"{1 - share:.0%} of the accepted tokens are lost"
    if gain < WORTHWHILE_GAIN:
        return "stale", f"{lost}, but alignment would gain only {gain - 1:.0%}: leave it", False, expected
    if reference <= cost:
        return "stale", f"{lost}; even aligned it would not beat plain decoding: use a better draft", False, expected
    return "stale", f"adapt: {lost}, alignment would make serving about {gain:.2f} times as fast", True, expected
