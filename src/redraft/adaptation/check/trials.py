"""Trials on the target's own answers: what is accepted of the draft as it is read, and with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from redraft.adaptation.check.rounds import Rounds, Tapped, gain, rounds_of
from redraft.adaptation.probe import greedy_answers
from redraft.data.store import Row
from redraft.drafts.base import Draft
from redraft.drafts.suspects import Suspect
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.features import FeatureSource
from redraft.registries import FAMILIES
from redraft.rows import anchors
from redraft.target import Target

Told = Callable[..., None]


@dataclass
class Ground:
    """The target's greedy answers to the prompts, with its states at every layer that a trial may ask for.

    Answers are longer than a server's by a round; ``limits`` say what a server would have given of each.
    """

    target: Target
    rows: Sequence[Row]
    source: FeatureSource | None
    have: tuple[int, ...]
    gamma: int
    limits: Mapping[str, int]

    def features(self, taps: Sequence[int]) -> FeatureSource | None:
        """The states at these layers, in their order; none for a draft that reads none."""
        if self.source is None or not taps:
            return None
        return Tapped(self.source, self.have, self.target.hidden_size, taps)

    def rounds(self, draft: Draft) -> Rounds:
        """The rounds of a draft over these answers."""
        return rounds_of(draft, self.target, self.rows, self.features(draft.taps), self.gamma, self.limits)

    def holds(self, draft: Draft) -> bool:
        """Whether the states at the draft's layers are here."""
        return set(draft.taps) <= set(self.have)

    def suspects(self, draft: Draft) -> list[Suspect]:
        """What the draft's family suspects, as far as the states for it are here."""
        found = suspects_of(draft, self.target, self.rows, self.features(draft.taps))
        return [suspect for suspect in found if self.holds(suspect.draft)]


def suspects_of(
    draft: Draft, target: Target, rows: Sequence[Row] = (), features: FeatureSource | None = None
) -> Iterator[Suspect]:
    """Every change that the family of ``draft`` knows; those that are learnt from text need rows."""
    found: Iterator[Suspect] = FAMILIES.get(draft.family).suspects(draft, target, rows, features)
    return found


@contextmanager
def ground(
    target: Target, draft: Draft, prompts: Sequence[Prompt], gamma: int, tokens: int, progress: Told | None = None
) -> Iterator[Ground]:
    """Let the target answer the prompts with ``tokens`` tokens, and a round's more where its context has room.

    Raises ``UserError`` where there is nothing to measure.
    """
    layers = {k for suspect in suspects_of(draft, target) for k in suspect.draft.taps} | set(draft.taps)
    have = tuple(sorted(layers))
    room = target.context - max(len(prompt.ids) for prompt in prompts)
    with greedy_answers(target, have, prompts, min(tokens + gamma, room), progress) as (rows, store):
        if not rows:
            raise UserError("the target ends every answer at once; check its chat template and end token")
        limits = {row.key: min(len(row.response_ids), tokens) for row in rows}
        yield Ground(target, sorted(rows, key=lambda row: row.key), store, have, gamma, limits)


@dataclass(frozen=True)
class Trial:
    """A change with its rounds: what tau rose by over the draft as it is read, and whether that is sure and much.

    ``number`` is its place in the family's own order.
    """

    number: int
    suspect: Suspect
    rounds: Rounds = field(repr=False)
    gain: float
    sure: bool


def run_trials(place: Ground, draft: Draft, before: Rounds, tick: Callable[[str], None] | None = None) -> list[Trial]:
    """Every suspect walked, the best first. A change that was learnt from rows is measured on the others."""
    found = []
    for number, suspect in enumerate(place.suspects(draft)):
        rounds = place.rounds(suspect.draft)
        keys = [key for key in before.keys if key not in suspect.seen and rounds.by_key.get(key)]
        found.append(Trial(number, suspect, rounds, *gain(rounds, before, keys)))
        if tick:
            tick(suspect.what)
    return sorted(found, key=lambda trial: (not trial.sure, -trial.gain))


def mended(place: Ground, draft: Draft, before: Rounds, tick: Callable[[str], None] | None = None) -> list[list[Trial]]:
    """The trials of the draft, and of what the best change makes of it, as long as one helps; two deep at most."""
    levels: list[list[Trial]] = []
    while len(levels) < 2:
        levels.append(run_trials(place, draft, before, tick))
        if not levels[-1] or not levels[-1][0].sure:
            break
        best = levels[-1][0]
        draft, before = best.suspect.draft, _without(best.rounds, best.suspect.seen)
    return levels


def _without(rounds: Rounds, seen: frozenset[str]) -> Rounds:
    return replace(rounds, by_key={key: found for key, found in rounds.by_key.items() if key not in seen})


def positions(row: Row) -> int:
    """The last position of a text that a round starts behind."""
    return len(row.prompt_ids) + anchors(row)
