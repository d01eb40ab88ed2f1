"""From what contestants did on the same prompts to figures: tau, tokens a second, and one contestant over another.

Whoever measured them, an engine in this process or a client of a server, gives a :class:`Tally` each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redraft.evaluate.statistics import Interval, mean, paired_difference, paired_ratio, ratio_of_sums

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
