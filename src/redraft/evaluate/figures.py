"""From what contestants did on the same prompts to figures: tau, tokens a second, and one contestant over another.

Whoever measured them, an engine in this process or a client of a server, gives a :class:`Tally` each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redraft import metrics
from redraft.decode.requests import Generation
from redraft.drafts.base import Draft
from redraft.evaluate.statistics import Interval, mean, paired_difference, paired_ratio, ratio_of_sums
from redraft.target import Target

PLAIN = "plain"  # the contestant that every other is held against

Figure = dict[str, float | None]


@dataclass(frozen=True)
class Tally:
    """Of one contestant, an entry a prompt: all ``tokens`` and ``seconds``, the tokens of its rounds, and the rounds.

    The first token of a response, which prefill gives, is in no round; a prompt without a round counts in no tau.
    Where only the totals of all prompts are known there is one entry (``whole``), and figures have no interval.
    """

    tokens: Sequence[float]
    seconds: Sequence[float]
    of_rounds: Sequence[float]
    rounds: Sequence[float]
    whole: bool = False

    def part(self, places: Iterable[int]) -> Tally:
        """The same of some prompts."""
        kept = list(places)
        given = self.tokens, self.seconds, self.of_rounds, self.rounds
        tokens, seconds, of_rounds, rounds = ([column[i] for i in kept] for column in given)
        return Tally(tokens, seconds, of_rounds, rounds, self.whole)

    def with_rounds(self) -> list[int]:
        """The places of the prompts that had rounds."""
        return [place for place, rounds in enumerate(self.rounds) if rounds]

    def rate(self) -> Figure:
        """Tokens a second."""
        return self._figure(ratio_of_sums(self.tokens, self.seconds))

    def tau(self) -> Figure:
        """Tokens a round, pooled over the prompts that had rounds."""
        drafted = self.part(self.with_rounds())
        return self._figure(ratio_of_sums(drafted.of_rounds, drafted.rounds))

    def tau_macro(self) -> Figure:
        """The mean over prompts of tokens a round."""
        drafted = self.part(self.with_rounds())
        return self._figure(mean([n / d for n, d in zip(drafted.of_rounds, drafted.rounds, strict=True)]))

    def speedup(self, plain: Tally) -> Figure:
        """Tokens a second over those of another contestant on the same prompts."""
        return self._figure(paired_ratio((self.tokens, self.seconds), (plain.tokens, plain.seconds)))

    def _figure(self, found: Interval) -> Figure:
        return {"value": found.value, "low": None, "high": None} if self.whole else {**found.to_dict()}


def by_task(mine: Tally, plain: Tally | None, tasks: Sequence[str], order: Iterable[str]) -> dict[str, Any]:
    """Acceptance and speed on the prompts of each task, in this order; a task without a round is left out."""
    found: dict[str, Any] = {}
    for task in order:
        places = [place for place, name in enumerate(tasks) if name == task]
        part = mine.part(places)
        if not part.with_rounds():
            continue
        found[task] = {"prompts": len(places), "tau_pooled": part.tau(), "tokens_per_second": part.rate()}
        if plain:
            base = plain.part(places)
            found[task] |= {"speedup": part.speedup(base), "plain_tokens_per_second": base.rate()}
    return found


def gains(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """Every later draft against the first: tau over the prompts on which both drafted, and speed over all."""
    found: dict[str, Any] = {}
    first = next(iter(tallies), "")
    for name, new in list(tallies.items())[1:]:
        old = tallies[first]
        both = [place for place in new.with_rounds() if old.rounds[place]]
        mine, theirs = new.part(both), old.part(both)
        tau = paired_difference((mine.of_rounds, mine.rounds), (theirs.of_rounds, theirs.rounds))
        found[f"{name} over {first}"] = {"tau": tau.to_dict(), "speed": new.speedup(old)}
    return found


def per_prompt(
    names: Iterable[str], asked: Mapping[int, tuple[str, str]], entry: Callable[[str, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A record of each prompt (id and task by place): what ``entry`` says of every contestant on it."""
    found = []
    for place, (id, task) in asked.items():
        record: dict[str, Any] = {"id": id, "task": task} if task else {"id": id}
        entries = {name: entry(name, place) for name in names}
        record |= {PLAIN: entries.pop(PLAIN)} if PLAIN in entries else {}
        found.append(record | {"drafts": entries})
    return found


# -- of decoding in this process -------------------------------------------------------------------------------------
def seconds(generation: Generation) -> float:
    """Prefill and decoding together, in seconds."""
    return generation.prefill_seconds + generation.decode_seconds


def tally(runs: Sequence[Generation]) -> Tally:
    """Tokens, seconds and rounds of every prompt."""
    lengths = [len(run.ids) for run in runs]
    return Tally(lengths, [*map(seconds, runs)], [n - 1 for n in lengths], [len(run.rounds) for run in runs])


def summarise(
    runs: Sequence[Generation], plain: Tally, depth: int, expected: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The figures of one draft on all prompts; ``depth`` is the most tokens that a round can accept.

    ``expected`` are the texts of plain decoding in the draft's own data type.
    """
    accepted, drafted = ([[getattr(r, name) for r in run.rounds] for run in runs] for name in ("accepted", "depth"))
    conditional, unconditional = (
        [None if math.isnan(share) else share for share in shares]
        for shares in metrics.acceptance_by_position(accepted, drafted, depth)
    )
    draft_s = sum(record.draft_seconds for run in runs for record in run.rounds)
    verify_s = sum(record.verify_seconds for run in runs for record in run.rounds)
    mine = tally(runs)
    return {
        "tau_pooled": mine.tau(),
        "tau_macro": mine.tau_macro(),
        "acceptance_conditional": conditional,
        "acceptance_unconditional": unconditional,
        "tokens_per_second": mine.rate(),
        "speedup": mine.speedup(plain),
        "time": {
            "draft": draft_s,
            "verify": verify_s,
            "prefill": sum(r.prefill_seconds for r in runs),
            "other": sum(r.decode_seconds for r in runs) - draft_s - verify_s,
        },
        "rounds": sum(mine.rounds),
        "tokens": sum(mine.of_rounds),
        "identical_to_plain": sum(list(run.ids) == list(ids) for run, ids in zip(runs, expected, strict=True)),
    }


def costs(target: Target, draft: Draft, runs: Sequence[Generation], plain: Sequence[Generation]) -> dict[str, Any]:
    """``{"mbsu": {"time": ..., "bytes": ...}}``: tau / (c * gamma + 1) (Goel et al., arXiv 2403.00858) and c, the
    ``cost`` of a draft step in units of a target step, from measured seconds and from the bytes that a step reads.

    A draft step is one level of a round's proposal: a token of a chain, a level of a tree. Gamma is the mean number
    of levels a round. ``time`` is null when no round, or no plain step, was timed.
    """
    records = [record for run in runs for record in run.rounds]
    steps = sum(record.depth for record in records)
    if not steps:
        return {"mbsu": {}}
    tau, gamma = sum(len(run.ids) - 1 for run in runs if run.rounds) / len(records), steps / len(records)
    # A draft decodes in its target's type, whatever type it came in.
    size = target.head.weight.element_size()
    found = {"bytes": metrics.cost_by_bytes(draft.parameters_per_token * size, target.parameters_per_token * size)}
    plain_steps, plain_seconds = sum(len(run.ids) - 1 for run in plain), sum(run.decode_seconds for run in plain)
    if plain_steps and plain_seconds > 0:
        drafting = sum(record.draft_seconds for record in records)
        found["time"] = metrics.cost_by_time(drafting, steps, plain_seconds, plain_steps)
    return {"mbsu": {name: {"value": metrics.mbsu(tau, gamma, c), "cost": c} for name, c in found.items()}}
