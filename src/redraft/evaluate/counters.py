"""A server's own Prometheus counters: what speculation did between two readings.

Counters only grow, so figures of a run are differences. Two vocabularies are known:

vLLM: ``vllm:spec_decode_num_drafts`` (rounds, one a sequence and step), ``_num_draft_tokens``,
``_num_accepted_tokens`` and ``_num_accepted_tokens_per_pos`` (label ``position``). tau = 1 + accepted / rounds:
every round counts in full, also the last, of which the stop rule may keep a part.

SGLang: ``sglang:spec_verify_calls_total`` (rounds, added when a request ends) is the only cumulative one. Accepted
tokens are not counted, but the client knows what it received: tau = (output tokens - requests) / rounds, the first
token of a request being prefill's. The stop rule's cut is in it. The gauges ``sglang:spec_accept_length`` and
``sglang:spec_accept_rate`` are means over the server's latest batches. They cannot be differenced; they are passed on
under their own names, as last seen, and no figure is made of them.

All engines (label ``engine``), ranks and models of one server are summed. Names may end in ``_total``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from redraft.errors import UserError

VLLM, SGLANG = "vllm:", "sglang:"
ENGINES = {VLLM: "vLLM", SGLANG: "SGLang"}
ROUNDS = {VLLM: "spec_decode_num_drafts", SGLANG: "spec_verify_calls"}
DRAFTED = "spec_decode_num_draft_tokens"
ACCEPTED = "spec_decode_num_accepted_tokens"
PER_POSITION = "spec_decode_num_accepted_tokens_per_pos"
GENERATED = "generation_tokens"
CACHED = {VLLM: "prefix_cache_hits", SGLANG: "cached_tokens"}
GAUGES = ("spec_accept_length", "spec_accept_rate")
STARTED = "process_start_time_seconds"
WANTED = (*ROUNDS.values(), DRAFTED, ACCEPTED, GENERATED, *CACHED.values(), *GAUGES, STARTED)
SOURCES = {
    VLLM: "vLLM's counters: 1 + accepted tokens / rounds, so rounds which the stop rule cuts count in full",
    SGLANG: "SGLang's counter of rounds: (output tokens received - requests) / rounds, after the stop rule's cut",
}


@dataclass(frozen=True)
class Reading:
    """One reading of ``/metrics``. ``prefix`` is the engine's, empty when the text is of neither engine.

    ``rounds`` is None where the server has no counter of them; ``per_position`` maps a position from 0 to its count.
    """

    prefix: str = ""
    rounds: float | None = None
    drafted: float | None = None
    accepted: float | None = None
    per_position: dict[int, float] = field(default_factory=dict)
    generated: float | None = None
    cached: float | None = None
    started: float | None = None
    gauges: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """What the counters gained between two readings; the fields of :class:`Reading` without the moments."""

    prefix: str
    rounds: int | None
    drafted: int | None
    accepted: int | None
    per_position: list[int]
    generated: int | None
    cached: int | None

    def tau_tokens(self, tokens: int, requests: int) -> int:
        """The numerator of tau over ``rounds``: from the counters, or from ``tokens`` received by ``requests``."""
        if self.accepted is not None:
            return self.accepted + (self.rounds or 0)
        return tokens - requests


def parse_metrics(text: str) -> Reading:
    """A reading from the Prometheus text format. Raises ``UserError`` for text that is not in that format."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise UserError(
            "reading a server's counters needs the package prometheus-client: pip install redraft[vllm-client]"
        ) from error
    sums: dict[str, float] = defaultdict(float)
    positions: dict[int, float] = defaultdict(float)
    gauges: dict[str, float] = {}
    families: set[str] = set()
    # a server has thousands of lines (histograms above all), and is read twice for every prompt
    lines = (line for line in text.splitlines() if any(name in line for name in WANTED))
    try:
        for family in text_string_to_metric_families("\n".join(lines)):
            families.add(family.name.removesuffix("_total"))
            for sample in family.samples:
                name = sample.name.removesuffix("_total")
                if name == VLLM + PER_POSITION:
                    positions[int(sample.labels["position"])] += sample.value
                elif name.removeprefix(SGLANG) in GAUGES:
                    gauges[name] = sample.value
                else:
                    sums[name] += sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"the server's /metrics are not in the Prometheus text format: {error}") from error
    return _reading(sums, positions, gauges, families)


def _reading(
    sums: dict[str, float], positions: dict[int, float], gauges: dict[str, float], families: set[str]
) -> Reading:
    prefix = next((p for p in ENGINES if any(name.startswith(p) for name in families)), "")

    def value(name: str) -> float | None:
        """A counter that is declared and has no sample yet has not counted anything: 0."""
        whole = prefix + name
        return sums.get(whole, 0.0) if whole in families or whole in sums else None

    if not prefix:
        return Reading(started=sums.get(STARTED))
    return Reading(
        prefix=prefix,
        rounds=value(ROUNDS[prefix]),
        drafted=value(DRAFTED),
        accepted=value(ACCEPTED),
        per_position=dict(positions),
        generated=value(GENERATED),
        cached=value(CACHED[prefix]),
        started=sums.get(STARTED),
        gauges=gauges,
    )


def difference(before: Reading, after: Reading, where: str) -> Counts:
    """What was counted between two readings of the server ``where``.

    Raises ``UserError`` when a counter went backwards, vanished, or the server's process is another: it was
    restarted, and what it had counted until then is lost.
    """
    pairs = [
        (before.rounds, after.rounds),
        (before.drafted, after.drafted),
        (before.accepted, after.accepted),
        (before.generated, after.generated),
        (before.cached, after.cached),
        *((count, after.per_position.get(position)) for position, count in before.per_position.items()),
    ]
    if before.started != after.started or any(old is not None and (new is None or new < old) for old, new in pairs):
        raise UserError(f"the counters of the server {where} went backwards: it was restarted; measure again")
    length = max(after.per_position, default=-1) + 1
    return Counts(
        prefix=after.prefix,
        rounds=_gain(before.rounds, after.rounds),
        drafted=_gain(before.drafted, after.drafted),
        accepted=_gain(before.accepted, after.accepted),
        per_position=[
            round(after.per_position.get(position, 0) - before.per_position.get(position, 0))
            for position in range(length)
        ],
        generated=_gain(before.generated, after.generated),
        cached=_gain(before.cached, after.cached),
    )


def _gain(before: float | None, after: float | None) -> int | None:
    """A counter that appeared in between (its first sample makes it appear) began at 0."""
    return None if after is None else round(after - (before or 0))


def total(parts: Iterable[Counts]) -> Counts:
    """The sum of several differences of one server; a field that one of them lacks is lacking."""
    found = list(parts)

    def summed(values: list[Any]) -> int | None:
        return None if any(value is None for value in values) else sum(values)

    length = max((len(part.per_position) for part in found), default=0)
    return Counts(
        prefix=found[0].prefix if found else "",
        rounds=summed([part.rounds for part in found]),
        drafted=summed([part.drafted for part in found]),
        accepted=summed([part.accepted for part in found]),
        per_position=[
            sum(part.per_position[position] for part in found if position < len(part.per_position))
            for position in range(length)
        ],
        generated=summed([part.generated for part in found]),
        cached=summed([part.cached for part in found]),
    )


def acceptance(counts: Counts) -> tuple[list[float], list[float | None]]:
    """(unconditional, conditional) acceptance by position, from the counts of accepted tokens by position.

    Unconditional: accepted at position j / rounds. Conditional: accepted at j / accepted at j - 1, for a chain, in
    which position j is reached exactly when j - 1 was accepted; None where nothing reached it. Both take for granted
    that every round drafts every position. Empty lists where the server does not count positions.
    """
    if not counts.rounds:
        return [], []
    reached = [counts.rounds, *counts.per_position]
    unconditional = [count / counts.rounds for count in counts.per_position]
    conditional = [taken / r if r else None for taken, r in zip(counts.per_position, reached, strict=False)]
    return unconditional, conditional
