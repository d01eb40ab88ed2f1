"""A server's own Prometheus counters: what speculation did between two readings.

Counters only grow, so figures of a run are differences. Two vocabularies are known:

vLLM: ``vllm:spec_decode_num_drafts`` (rounds, one a sequence and step), ``_num_draft_tokens``,
``_num_accepted_tokens`` and ``_num_accepted_tokens_per_pos`` (label ``position``). tau = 1 + accepted / rounds:
every round counts in full, also the last, of which the stop rule may keep a part.

SGLang: ``sglang:spec_verify_calls_total`` (rounds, added when a request ends) is the only cumulative one. Accepted
tokens are not counted, but the client knows what it received: tau = (output tokens - requests) / rounds, the first
token of a request being prefill's. The stop rule's cut is in it. The gauges ``sglang:spec_accept_length`` and
``sglang:spec_accept_rate``, means over the latest batches, are passed on as last seen; no figure is made of them.

Samples of one counter with different labels (engines of a data-parallel server, models) are summed. Schedulers that
share a model's work (``tp_rank`` and the like) each count all of it: of these the highest is taken. A sample that is
there twice with the same labels, as of two processes whose registries were put together, is refused: whether to add
them nobody knows. Names may end in ``_total``; both spellings are the same counter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

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
# Labels of schedulers that share the work of one model, each of which counts all of it.
SHARING = ("tp_rank", "pp_rank", "ep_rank", "moe_ep_rank", "moe_dp_rank", "attn_tp_rank", "attn_cp_rank")
WANTED = (*ROUNDS.values(), DRAFTED, ACCEPTED, GENERATED, *CACHED.values(), *GAUGES, STARTED)
# The fields of a reading and of a difference that are one number each.
COUNTED = ("rounds", "drafted", "accepted", "generated", "cached")
SOURCES = {
    VLLM: "vLLM's counters: 1 + accepted tokens / rounds, so rounds which the stop rule cuts count in full",
    SGLANG: "SGLang's counter of rounds: (output tokens received - requests) / rounds, after the stop rule's cut",
}

# What a float holds exactly; no counter gets there. Positions: no engine drafts a chain so long.
MOST_COUNTED, MOST_POSITIONS = 2**53, 4096

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Counts:
    """What counters hold, or gained between two readings; None is what a server does not count.

    ``prefix`` is the engine's, empty when there is neither; ``per_position`` holds accepted tokens by position.
    """

    prefix: str = ""
    rounds: float | None = None
    drafted: float | None = None
    accepted: float | None = None
    per_position: list[float] = field(default_factory=list)
    generated: float | None = None
    cached: float | None = None

    def tau_tokens(self, tokens: int, requests: int) -> float:
        """The numerator of tau over ``rounds``: from the counters, or from ``tokens`` received by ``requests``."""
        return tokens - requests if self.accepted is None else self.accepted + (self.rounds or 0)


@dataclass(frozen=True)
class Reading(Counts):
    """One reading of ``/metrics``.

    ``parts`` holds every sample of a counter by name and labels, ``made`` the time when it began, where that is told.
    """

    started: float | None = None
    gauges: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    made: dict[str, float] = field(default_factory=dict)


def parse_metrics(text: str) -> Reading:
    """A reading from the Prometheus text format.

    Raises ``UserError`` for text that is not in that format, for a value that no counter has, and for a sample that
    is there twice.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise UserError(
            "reading a server's counters needs the package prometheus-client: pip install redraft[vllm-client]"
        ) from error
    found = _Samples()
    # a server has thousands of lines (histograms above all), and is read twice for every prompt
    lines = (line for line in text.splitlines() if any(name in line for name in WANTED))
    try:
        for family in text_string_to_metric_families("\n".join(lines)):
            found.families.add(family.name.removesuffix("_total"))
            for sample in family.samples:
                found.take(sample.name, sample.labels, sample.value)
        return found.reading()
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"the server's /metrics are not in the Prometheus text format: {str(error)[:200]}") from error


@dataclass
class _Samples:
    """What of a text is of use, sample by sample."""

    families: set[str] = field(default_factory=set)
    counters: dict[str, dict[Labels, float]] = field(default_factory=lambda: defaultdict(dict))
    gauges: dict[str, float] = field(default_factory=dict)
    made: dict[str, float] = field(default_factory=dict)
    seen: set[tuple[str, Labels]] = field(default_factory=set)

    def take(self, spelled: str, labels: Mapping[str, str], value: float) -> None:
        """Raises ``UserError`` for a sample that is there twice, ``ValueError`` for a value that cannot be."""
        name, key = spelled.removesuffix("_total"), tuple(sorted(labels.items()))
        if name.removeprefix(SGLANG) in GAUGES:
            if math.isfinite(value):  # a mean over no batch yet is none
                self.gauges[name] = value
            return
        if name.endswith("_created"):
            self.made[f"{name.removesuffix('_created')}{key}"] = value
            return
        if (spelled, key) in self.seen:
            shown = ", ".join(f'{label}="{text}"' for label, text in key)
            raise UserError(
                f"the server's /metrics show {spelled}{{{shown}}} twice: counters of several processes without a "
                "label that tells them apart; measure one process, or let the server put them together"
            )
        self.seen.add((spelled, key))
        if not 0 <= value <= MOST_COUNTED:
            raise ValueError(f"{spelled} is {value}")
        counter = self.counters[name]
        counter[key] = max(value, counter.get(key, 0.0))  # both spellings of one sample agree

    def sums(self, name: str) -> dict[str | None, float]:
        """The counter by position (None where it has none): schedulers that share work once, all else added up."""
        groups: dict[Labels, float] = {}
        for key, value in self.counters.get(name, {}).items():
            whole = tuple(pair for pair in key if pair[0] not in SHARING)
            groups[whole] = max(value, groups.get(whole, 0.0))
        found: dict[str | None, float] = defaultdict(float)
        for key, value in groups.items():
            found[dict(key).get("position")] += value
        return dict(found)

    def reading(self) -> Reading:
        """All of it. A counter that is declared and has no sample yet has not counted anything: 0."""
        prefix = next((p for p in ENGINES if any(name.startswith(p) for name in self.families)), "")
        started = sum(self.sums(STARTED).values()) if STARTED in self.counters else None
        if not prefix:
            return Reading(started=started)
        asked = zip(COUNTED, (ROUNDS[prefix], DRAFTED, ACCEPTED, GENERATED, CACHED[prefix]), strict=True)
        whole = {field: prefix + name for field, name in asked}
        names = (*whole.values(), prefix + PER_POSITION)
        places = {int(str(position)): count for position, count in self.sums(VLLM + PER_POSITION).items()}
        if places and not 0 <= min(places) <= max(places) < MOST_POSITIONS:
            raise ValueError(f"a position {max(places, key=abs)} of {PER_POSITION}")
        return Reading(
            prefix,
            per_position=[places.get(j, 0) for j in range(max(places, default=-1) + 1)],
            started=started,
            gauges=self.gauges,
            parts={f"{name}{key}": count for name in names for key, count in self.counters.get(name, {}).items()},
            made={key: time for key, time in self.made.items() if key.startswith(names)},
            **{
                field: sum(self.sums(name).values()) if name in self.families or name in self.counters else None
                for field, name in whole.items()
            },
        )


def backwards(before: Reading, after: Reading) -> bool:
    """Whether a counter, or one engine's part of it, went backwards, vanished or began anew, or the server's process is
    another."""
    pairs = [
        *((count, after.parts.get(part)) for part, count in before.parts.items()),
        *((getattr(before, name), getattr(after, name)) for name in COUNTED),
        *zip_longest(before.per_position, after.per_position),
    ]
    another = before.started != after.started or any(after.made.get(part) != at for part, at in before.made.items())
    return another or any(old is not None and (new is None or new < old) for old, new in pairs)


def overdone(before: Reading, after: Reading, tokens: int) -> bool:
    """Whether more was counted than answers of ``tokens`` tokens in all can have made: the server does other work, or
    one of the readings is odd. A round gives a token at least."""
    gains = [(after.generated or 0) - (before.generated or 0), (after.rounds or 0) - (before.rounds or 0)]
    return max(gains) > 1.01 * tokens + 16


def difference(before: Reading, after: Reading, where: str) -> Counts:
    """What was counted between two readings of the server ``where``.

    Raises ``UserError`` when they go backwards (:func:`backwards`): it was restarted, and what it had counted until
    then is lost.
    """
    if backwards(before, after):
        raise UserError(
            f"the counters of the server {where} went backwards: it was restarted; measure again "
            "(where several processes answer in turn, each with counters of its own, measure one of them)"
        )
    # A counter that appeared in between (its first sample makes it appear) began at 0.
    gained = {name: (getattr(before, name), getattr(after, name)) for name in COUNTED}
    return Counts(
        after.prefix,
        per_position=[
            round(new - old) for old, new in zip_longest(before.per_position, after.per_position, fillvalue=0)
        ],
        **{name: None if new is None else round(new - (old or 0)) for name, (old, new) in gained.items()},
    )


def total(parts: Iterable[Counts]) -> Counts:
    """The sum of several differences of one server; a field that one of them lacks is lacking."""
    found = list(parts)
    values = {name: [getattr(part, name) for part in found] for name in COUNTED}
    return Counts(
        found[0].prefix if found else "",
        per_position=[sum(place) for place in zip_longest(*(part.per_position for part in found), fillvalue=0)],
        **{name: None if None in some else sum(some) for name, some in values.items()},
    )


def drafted_share(counts: Counts) -> float | None:
    """Drafted tokens over rounds times positions; None where either is not counted. Below 1 some rounds drafted less
    than others, and what was never drafted counts as rejected in :func:`acceptance`."""
    most = (counts.rounds or 0) * len(counts.per_position)
    return counts.drafted / most if most and counts.drafted is not None else None


def contradiction(counts: Counts) -> str:
    """What cannot be of a server's counts, for a message; empty where they agree with each other."""
    rounds, accepted, places = counts.rounds or 0, counts.accepted, counts.per_position
    if accepted is not None and counts.drafted is not None and accepted > counts.drafted:
        return f"{accepted} accepted of {counts.drafted} drafted tokens"
    if places and accepted is not None and sum(places) != accepted:
        return f"{sum(places)} accepted tokens by position, {accepted} in all"
    if any(after > before for before, after in zip([rounds, *places], places, strict=False)):
        return f"more tokens accepted at a position than at the one before it ({rounds} rounds, then {places})"
    return ""


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
