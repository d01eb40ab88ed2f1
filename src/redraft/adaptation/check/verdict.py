"""What the evidence comes to: causes in the order of their likelihood, each with what shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from redraft.adaptation.check.rounds import LEAST_SHARE, Rounds, gain
from redraft.adaptation.check.served import Served, Texts, same_rounds
from redraft.adaptation.check.trials import Trial
from redraft.evaluate import counters
from redraft.starts.vocabulary import Coverage

# Shares of the server's choices that are not the target's best: above, it is another model; of clear ones above, its
# target is rounded otherwise.
ANOTHER, ROUNDED, FEW = 0.3, 0.003, 2
# A server accepts less where it loses this share of the accepted tokens; rounding loses less.
LOWER = 0.04
# A change explains a server where it brings our rates this much nearer to the server's.
EXPLAINED, EXACTLY = 0.35, 0.1
# Changes whose rates are this near to each other's cannot be told apart.
TIED = 0.02
# Shares of drafted positions and of tokens below and above which an engine is held to draft less than asked.
FULL, OUTSIDE = 0.9, 0.1
# Late positions have fallen off where they are accepted this much less often than the early ones.
FALLEN, SEEN = 0.6, 30
# A draft loses the thread where rounds behind a position accept less than half of those before it.
HALF = 0.5
# Tokens accepted a round that a draft must reach for a change to be believed.
USEFUL = 0.5
# The vocabulary is a cause where it leaves out this share of tokens.
UNSAYABLE = 0.05


@dataclass(frozen=True)
class Evidence:
    """A cause with what shows it; ``option`` and ``gamma`` go into the command that mends it."""

    cause: str
    words: str
    option: str = ""
    gamma: int | None = None


def limits(served: Served, asked: int | None) -> list[Evidence]:
    """An engine that drafts less than it was asked to."""
    whole, found = served.counted.whole, list[Evidence]()
    if not whole.rounds:
        return []
    if whole.drafted is not None:
        each, places = whole.drafted / whole.rounds, len(whole.per_position)
        wanted = asked or places
        if asked and each < asked - 0.05:
            found.append(
                Evidence("engine_limit", f"{each:.1f} tokens are drafted a round, {asked} were asked", "", asked)
            )
        elif wanted and each < FULL * wanted:
            words = f"rounds draft {each:.1f} of their {wanted} positions on average"
            found.append(Evidence("engine_limit", words, "", wanted))
    if whole.accepted is not None:
        received = sum(served.counted.tokens.values()) - len(served.counted.tokens)
        outside = received - whole.accepted - whole.rounds
        if outside > OUTSIDE * max(1, received):
            words = f"{outside:,.0f} of {received:,} tokens came without a round of speculation"
            found.append(Evidence("engine_limit", words, "", asked or len(whole.per_position) or None))
    return found[:1]


def other_texts(texts: Texts | None) -> list[Evidence]:
    """A served target that chooses other tokens than the target at hand."""
    if texts is None or not texts.choices:
        return []
    share = texts.others / texts.choices
    words = f"{texts.others:,} of {texts.choices:,} tokens of the server are not the target's choice ({share:.1%}), "
    words += f"{texts.clear} of them where it is sure"
    if share > ANOTHER:
        return [Evidence("other_target", words)]
    if texts.clear >= max(FEW, ROUNDED * texts.choices):
        return [Evidence("target_quantised", words)]
    return []


# -- the server against this engine ----------------------------------------------------------------------------------
def lower(served: Served, here: Rounds) -> bool:
    """Whether the server accepts surely and much less than the same draft does here, on the same prompts."""
    keys = [key for key in served.counted.keys if here.by_key.get(key)]
    return bool(keys) and gain(here, served.counted, keys, LOWER)[1]


def misreading(
    served: Served, here: Rounds, trials: Sequence[Trial], told: Sequence[str], most: float = EXPLAINED
) -> Evidence | None:
    """The change under which our rates become the server's, but for this share (``most``) of what they are apart;
    those that the file itself speaks for (``told``) come first."""
    before = same_rounds(served.counted, here)
    near = [(same_rounds(served.counted, trial.rounds), trial) for trial in trials if not trial.suspect.seen]
    favour = 0.1 * before
    near.sort(key=lambda one: (round(one[0] - favour * (one[1].suspect.served in told), 2), one[1].number))
    if not near or near[0][0] > most * before:
        return None
    distance, trial = near[0]
    words = f"{trial.suspect.what}: our rates are then {distance:.2f} from the server's, as read here {before:.2f}"
    same = [other.suspect.what for apart, other in near[1:] if apart <= distance + TIED]
    words += f" (so would be: {'; '.join(same)})" if same else ""
    return Evidence(trial.suspect.served, words)


@dataclass
class Piece:
    """A stretch of text behind a position, with what was accepted a round there, here and at the server."""

    at: int
    here: float
    there: float


def falling(pieces: Sequence[Piece]) -> Evidence | None:
    """A position behind which the server falls off while this engine does not."""
    ordered = sorted(pieces, key=lambda piece: piece.at)
    for cut in range(2, len(ordered) - 1):
        early, late = _share(ordered[:cut]), _share(ordered[cut:])
        if early >= 1 - LEAST_SHARE and late <= HALF * early:
            words = f"up to position {ordered[cut].at} the server accepts {early:.0%} of what is accepted here, "
            return Evidence("short_context", words + f"behind it {late:.0%}")
    return None


def _share(pieces: Sequence[Piece]) -> float:
    return sum(piece.there for piece in pieces) / max(1e-9, sum(piece.here for piece in pieces))


# -- the draft itself ------------------------------------------------------------------------------------------------
def changes(levels: Sequence[Sequence[Trial]], reference: Reference | None) -> list[Evidence]:
    """The changes that win back acceptance, the best of each level.

    A draft that is read as it was trained is of some use, and where it is known what it reached elsewhere, a change
    must win back half of that: a stale draft gains a little by many changes, all of them wrong.
    """
    found = []
    for trials in levels:
        best = trials[0] if trials else None
        if best is None or not best.sure:
            break
        tau = best.rounds.tau([key for key in best.rounds.keys if key not in best.suspect.seen])
        missed = 0.0 if reference is None else reference.tau - (tau.value - best.gain)
        if tau.value - 1 < USEFUL or best.gain < HALF * missed:
            break
        words = f"{best.suspect.what}: tau rises by {best.gain:.2f}, to {tau.value:.2f} "
        words += f"({tau.low:.2f} to {tau.high:.2f})"
        found.append(Evidence(best.suspect.cause, words, best.suspect.option))
    return found


def lost_thread(here: Rounds, positions: Sequence[int]) -> Evidence | None:
    """A position of the text behind which the draft itself accepts far less than before it."""
    for cut in positions:
        early, late = here.only(0, cut), here.only(cut)
        mean = [_mean(part) for part in (early, late)]
        if min(n for _, n in mean) >= SEEN and mean[0][0] > HALF and mean[1][0] < HALF * mean[0][0]:
            words = f"{mean[0][0]:.2f} tokens are accepted a round up to position {cut} of the text, "
            return Evidence("short_context", words + f"{mean[1][0]:.2f} behind it")
    return None


def _mean(rounds: Rounds) -> tuple[float, int]:
    every = [r.accepted for found in rounds.by_key.values() for r in found]
    return sum(every) / max(1, len(every)), len(every)


def too_long(here: Rounds) -> Evidence | None:
    """A drafted position from which on acceptance falls off from what it was at the first two."""
    reached = [sum(len(rounds) for rounds in here.by_key.values()), *here.accepted()]
    early = (reached[1] + reached[2]) / max(1, reached[0] + reached[1]) if len(reached) > 2 else 0.0
    if here.gamma < 3:
        return None
    for place in range(1, here.gamma):
        if reached[place] < SEEN:
            return None
        first = reached[1] / reached[0] if place == 1 else early
        rate = reached[place + 1] / reached[place]
        spread = 2 * (rate * (1 - rate) / reached[place]) ** 0.5
        if rate + spread < FALLEN * first:
            words = f"position {place + 1} is accepted {rate:.0%} of the times that it is reached, "
            words += f"the first ones {first:.0%}"
            return Evidence("too_long_drafts", words, gamma=place)
    return None


@dataclass(frozen=True)
class Reference:
    """What the draft reached elsewhere. ``where`` in words; ``base``: rounds on the base model's own answers, of which
    its vocabulary covers ``covered``."""

    tau: float
    where: str
    same_target: bool = False
    base: Rounds | None = field(default=None, repr=False)
    covered: Coverage | None = field(default=None, repr=False)


def against(here: Rounds, reference: Reference | None, claimed: bool) -> Evidence | None:
    """Stale, taught by the base, or on other text than it was trained on; none where it is as good as it was."""
    if reference is None:
        return None
    mine = here.tau()
    words = f"tau is {mine.value:.2f} ({mine.low:.2f} to {mine.high:.2f}), {reference.tau:.2f} {reference.where}"
    if reference.base is not None:
        keys = [key for key in here.keys if reference.base.by_key.get(key)]
        if not gain(reference.base, here, keys)[1]:
            return None
        return Evidence("base_teacher" if claimed else "stale", words)
    if reference.tau <= mine.high or reference.tau - 1 < (1 + LEAST_SHARE) * (mine.value - 1):
        return None
    return Evidence("other_text" if reference.same_target else "stale", words)


def poorer(here: Rounds, reference: Reference | None, claimed: bool, covered: Coverage | None) -> list[Evidence]:
    """Why a draft that is read as it was trained reaches little here: its vocabulary, the model or the text that it
    was made for, the likelier first.

    The vocabulary comes first only where its cap takes most of what was reached elsewhere; other text is no cause of
    its own where that is all that was lost.
    """
    words, other = unsayable(covered), against(here, reference, claimed)
    if words is None or other is None or covered is None or reference is None:
        return [one for one in (words, other) if one is not None]
    left = allowed(covered) / (1.0 if reference.covered is None else allowed(reference.covered))
    capped = 1 + (reference.tau - 1) * min(1.0, left)
    if other.cause == "other_text" and capped <= here.tau().high:
        return [words]
    most = reference.tau - capped >= HALF * (reference.tau - here.tau().value)
    return [words, other] if most else [other, words]


def allowed(covered: Coverage) -> float:
    """The share of accepted tokens that a vocabulary leaves to a draft that is right wherever it can be."""
    return (covered.tau_cap - 1) / max(1e-9, covered.tau_whole - 1)


def unsayable(found: Coverage | None) -> Evidence | None:
    """A vocabulary that leaves out many of the target's tokens."""
    if found is None or found.share >= 1 - UNSAYABLE:
        return None
    words = f"{1 - found.share:.1%} of the target's tokens are not among the draft's {found.size:,}; "
    return Evidence("vocabulary", words + f"no draft of this vocabulary has a tau above {found.tau_cap:.2f}")


def rates(found: Any) -> dict[str, Any]:
    """tau with its interval, and acceptance by position, as plain JSON values."""
    return {"tau": found.tau().to_dict(), "acceptance_conditional": found.conditional()}


def served_rates(served: Served) -> dict[str, Any]:
    """The same of a server, with its engine and the counters' own words."""
    more = {"engine": served.product, "tau_source": counters.SOURCES.get(served.counted.whole.prefix, "")}
    return rates(served.counted) | more
