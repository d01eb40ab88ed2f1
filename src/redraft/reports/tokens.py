"""Who proposed which token: the labels behind the page's token view and the terminal's.

A round keeps the draft's accepted tokens and then one of the target's own: the *bonus* when everything proposed was
accepted, else the *corrected* token. The stop rule may cut the end of the last round. The first token of a response
comes from prefill and belongs to no round.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from redraft.reports.load import Trace, TraceDraft, TraceRound

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
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def left_out(self) -> int:
        """How many rounds the cap left out."""
        return self.total_rounds - len(self.rounds)


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


def walk(draft: TraceDraft, tree: bool) -> Iterator[RoundView]:
    """The rounds of a trace in order."""
    at = 1
    for number, given in enumerate(draft.rounds, 1):
        texts = draft.tokens[at : at + given.kept]
        at += given.kept
        proposed = fates(given.accepted, texts, given.proposed, tree)
        labels = kinds(given.accepted, given.kept, given.full)
        yield RoundView(
            number=number,
            about=_about(given, tree),
            kept=[Piece(text, kind) for text, kind in zip(texts, labels, strict=True)],
            proposed=proposed[:MAX_PROPOSED],
            hidden=max(0, len(proposed) - MAX_PROPOSED),
            tokens=at,
            tau=(at - 1) / number,
        )


def _about(given: TraceRound, tree: bool) -> str:
    if tree:
        return f"{given.accepted} accepted, a tree of {len(given.proposed)} proposed"
    return f"{given.accepted} of {len(given.proposed)} accepted"


def draft_view(name: str, draft: TraceDraft, tree: bool) -> DraftView:
    """The view of one draft's trace, at most ``MAX_TOKENS`` tokens in whole rounds."""
    rounds = list(walk(draft, tree))
    counts = Counter(piece.kind for r in rounds for piece in r.kept)
    total = sum(counts.values())
    return DraftView(
        name=name,
        first=Piece(draft.tokens[0], "prefill") if draft.tokens else None,
        rounds=[r for r in rounds if r.tokens <= MAX_TOKENS],
        tau=total / len(rounds) if rounds else None,
        total_tokens=len(draft.tokens),
        total_rounds=len(rounds),
        shares={kind: counts[kind] / total for kind in KINDS if counts[kind]},
    )


def chosen(traces: Sequence[Trace], limit: int = MAX_TRACES) -> list[Trace]:
    """At most ``limit`` traces in their order, every task in turn, so that no task crowds out the others."""
    turn: Counter[str | None] = Counter()
    ranked = []
    for index, trace in enumerate(traces):
        ranked.append((turn[trace.task], index))
        turn[trace.task] += 1
    return [traces[index] for index in sorted(index for _, index in sorted(ranked)[:limit])]
