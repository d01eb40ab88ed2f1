"""Who proposed which token: the labels behind the page's token view and the terminal's.

A round keeps the draft's accepted tokens and then one of the target's own: the *bonus* when everything proposed was
accepted, else the *corrected* token. The stop rule may cut the end of the last round. The first token of a response
comes from prefill and belongs to no round.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from redraft.reports.load import Trace, TraceDraft

KINDS = {
    "accepted": "proposed by the draft and accepted",
    "corrected": "the target's own, after a rejection",
    "bonus": "the target's own, after everything was accepted",
    "prefill": "the first token, from prefill; in no round",
    "rejected": "proposed by the draft and rejected",
    "unused": "proposed behind a rejection, or cut by the stop rule",
}
MAX_TRACES, MAX_TOKENS, MAX_PROPOSED, MAX_PROMPT = 12, 600, 16, 1500
# Characters that turn the direction of text or take no room: shown by number, so that a token cannot disturb others.
HIDDEN = frozenset("\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff\u00ad")
EMPTY = "\N{WHITE SMALL SQUARE}"


def visible(text: str, breaks: bool = True) -> str:
    """``text`` without characters that act: controls and direction marks become their numbers.

    A line break becomes an arrow, followed by the break itself when ``breaks``. A token that is only part of a
    character has no text of its own and becomes a small square.
    """
    return "".join(_visible(character, breaks) for character in text) or EMPTY


def visible_text(text: str) -> str:
    """:func:`visible` for running text: line breaks and tabs stay what they are."""
    return "".join(c if c in "\n\t" else _visible(c, breaks=True) for c in text)


def _visible(character: str, breaks: bool) -> str:
    code = ord(character)
    if character == "\n":
        return "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}" + ("\n" if breaks else "")
    if character == "\t":
        return "\N{RIGHTWARDS ARROW TO BAR}" + ("\t" if breaks else "")
    if unicodedata.category(character) in ("Cc", "Zl", "Zp") or character in HIDDEN:
        return f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{code:04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
    if unicodedata.category(character) == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    return character


def kinds(accepted: int, kept: int, full: bool) -> list[str]:
    """The kind of each of a round's ``kept`` tokens."""
    own = ["accepted"] * min(accepted, kept)
    return own + [("bonus" if full else "corrected")] * (kept - len(own))


@dataclass(frozen=True)
class Piece:
    """A token's text, raw, and its kind (a key of ``KINDS``)."""

    text: str
    kind: str


@dataclass(frozen=True)
class RoundView:
    """One round: what was kept, what was proposed with its fate, and tau up to and with this round."""

    number: int
    about: str
    kept: list[Piece]
    proposed: list[Piece]
    hidden: int
    tokens: int
    tau: float


@dataclass(frozen=True)
class DraftView:
    """One draft's trace. ``tau`` and ``total_rounds`` are of the whole; ``rounds`` may be capped."""

    name: str
    first: Piece | None
    rounds: list[RoundView]
    tau: float | None
    total_tokens: int
    total_rounds: int
    shares: dict[str, float]


def fates(accepted: int, kept: Sequence[str], proposed: Sequence[str], tree: bool) -> list[Piece]:
    """Every proposed token with its fate. A chain's order tells it; a tree's accepted path is found by its text.

    ``kept`` are the round's tokens after the stop rule. Behind a chain's rejected token nothing was looked at.
    """
    if not tree:
        last = min(accepted, len(kept))
        verdicts = ["accepted"] * last + ["unused"] * (accepted - last) + ["rejected"]
        return [Piece(text, verdicts[i] if i < len(verdicts) else "unused") for i, text in enumerate(proposed)]
    path = Counter(kept[:accepted])
    found = []
    for text in proposed:
        taken = path[text] > 0
        path[text] -= taken
        found.append(Piece(text, "accepted" if taken else "rejected"))
    return sorted(found, key=lambda piece: piece.kind != "accepted")


def draft_view(name: str, draft: TraceDraft, tree: bool) -> DraftView:
    """The view of one draft's trace, at most ``MAX_TOKENS`` tokens in whole rounds."""
    at, rounds, counts = 1, [], Counter[str]()
    for number, given in enumerate(draft.rounds, 1):
        texts = draft.tokens[at : at + given.kept]
        at += given.kept
        labels = kinds(given.accepted, given.kept, given.full)
        counts.update(labels)
        if at > MAX_TOKENS:
            continue
        proposed, of = fates(given.accepted, texts, given.proposed, tree), len(given.proposed)
        about = f"{given.accepted} accepted, a tree of {of} proposed" if tree else f"{given.accepted} of {of} accepted"
        kept = [Piece(text, kind) for text, kind in zip(texts, labels, strict=True)]
        hidden = max(0, of - MAX_PROPOSED)
        rounds.append(RoundView(number, about, kept, proposed[:MAX_PROPOSED], hidden, at, (at - 1) / number))
    total, first = sum(counts.values()), Piece(draft.tokens[0], "prefill") if draft.tokens else None
    tau = total / len(draft.rounds) if draft.rounds else None
    shares = {kind: counts[kind] / total for kind in KINDS if counts[kind]}
    return DraftView(name, first, rounds, tau, len(draft.tokens), len(draft.rounds), shares)


def draft_views(trace: Trace, tree: bool) -> list[DraftView]:
    """The view of every draft's trace of one prompt."""
    return [draft_view(name, draft, tree) for name, draft in trace.drafts.items()]


def chosen(traces: Sequence[Trace], limit: int = MAX_TRACES) -> list[Trace]:
    """At most ``limit`` traces in their order, every task in turn, so that no task crowds out the others."""
    turn: Counter[str | None] = Counter()
    ranked = []
    for index, trace in enumerate(traces):
        ranked.append((turn[trace.task], index))
        turn[trace.task] += 1
    return [traces[index] for index in sorted(index for _, index in sorted(ranked)[:limit])]
