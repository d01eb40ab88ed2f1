"""The token view in a terminal, while decoding: who proposed which token, the running tau, tokens a second.

Colours are backgrounds with their own ink, so that they read on light and dark terminals; corrected and bonus tokens
are underlined too. Where there is no colour (a file, a pipe, ``NO_COLOR``) brackets say the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from redraft.decode.requests import Round, TokenText
from redraft.reports.tokens import Piece, fates, kinds, visible

# By kind: the style where there are colours, and the brackets where there are none.
LOOKS = {
    "accepted": ("color(16) on color(153)", "[]"),
    "corrected": ("color(16) on color(216) underline", "<>"),
    "bonus": ("color(16) on color(157) underline2", "{}"),
    "prefill": ("color(16) on color(252)", "()"),
    "rejected": ("dim strike", "~~"),
    "unused": ("dim", "~~"),
}
SHOWN_KINDS = ("accepted", "corrected", "bonus", "prefill")
TAIL = 2000  # pieces that a screen can hold at most


def coloured(console: Console) -> bool:
    """Whether ``console`` shows colours."""
    return console.is_terminal and not console.no_color and console.color_system is not None


def paint(pieces: Sequence[Piece], colour: bool) -> Text:
    """The pieces in their colours, or in brackets, which neighbours of a kind share."""
    text = Text()
    for index, piece in enumerate(pieces):
        shown = visible(piece.text, breaks=piece.kind in SHOWN_KINDS)
        style, mark = LOOKS[piece.kind]
        if colour:
            text.append(shown, style)
            continue
        opens = index == 0 or LOOKS[pieces[index - 1].kind][1] != mark
        closes = index + 1 == len(pieces) or LOOKS[pieces[index + 1].kind][1] != mark
        text.append((mark[0] if opens else "") + shown + (mark[1] if closes else ""))
    return text


def legend(colour: bool, rejected: bool) -> Text:
    """What the colours or brackets mean, in one line."""
    text = Text()
    for kind in (*SHOWN_KINDS, *(("rejected",) if rejected else ())):
        text.append_text(paint([Piece(kind, kind)], colour)).append("  ")
    text.rstrip()
    return text


class Watcher:
    """Shows rounds as they come; a context manager around one generation. Give :meth:`on_round` to the decoder.

    The decoder calls it once after prefill, with the first token and no proposals, and then after every round.
    """

    def __init__(
        self, console: Console, texts: TokenText, rejected: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.console, self.texts, self.rejected, self.clock = console, texts, rejected, clock
        self.colour = coloured(console)
        self.pieces: list[Piece] = []
        self.counts: Counter[str] = Counter()
        self.rounds = 0
        self.began = self.last = clock()
        self.live: Live | None = None

    def __enter__(self) -> Watcher:
        self.began = self.last = self.clock()
        if self.console.is_terminal:
            self.live = Live(get_renderable=self._screen, console=self.console, transient=True, refresh_per_second=12)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
            self.console.print(paint(self.pieces, self.colour))
        else:
            self.console.print()
        self.console.print(self.summary())

    def on_round(self, record: Round) -> None:
        """Take one round; the first one without proposals is prefill's token."""
        self.last = self.clock()
        if record.proposed or self.pieces:
            fresh = self._round(record)
        else:
            fresh = [Piece(self.texts.push(token), "prefill") for token in record.kept]
        self.pieces += fresh
        if self.live is None:
            self.console.print(paint(fresh, self.colour), end="", soft_wrap=True)

    def _round(self, record: Round) -> list[Piece]:
        proposed = self.texts.proposed(record) if self.rejected else []
        kept = [self.texts.push(token) for token in record.kept]
        labels = kinds(record.accepted, len(kept), record.full)
        self.rounds += 1
        self.counts.update(labels)
        fresh = [Piece(text, kind) for text, kind in zip(kept, labels, strict=True)]
        if not self.rejected:
            return fresh
        tree = record.depth != len(record.proposed)
        refused = [p for p in fates(record.accepted, kept, proposed, tree) if p.kind != "accepted"]
        at = min(record.accepted, len(kept))
        return fresh[:at] + refused + fresh[at:]

    @property
    def tau(self) -> float | None:
        """Tokens a round so far; None before the first round."""
        return sum(self.counts.values()) / self.rounds if self.rounds else None

    def status(self) -> str:
        """The running figures in one line."""
        shown = sum(piece.kind in SHOWN_KINDS for piece in self.pieces)
        seconds = self.last - self.began
        parts = [f"round {self.rounds}", f"{shown} tokens", f"tau {self.tau:.2f}" if self.tau else "tau -"]
        return "   ".join([*parts, f"{shown / seconds:.1f} tokens/s" if seconds > 0 else "- tokens/s"])

    def summary(self) -> str:
        """What came of it: the figures, and the share of every kind among the rounds' tokens."""
        total = sum(self.counts.values())
        shares = [f"{kind} {100 * self.counts[kind] / total:.0f}%" for kind in SHOWN_KINDS[:3]] if total else []
        return self.status() + (f"   ({', '.join(shares)})" if shares else "")

    def _screen(self) -> Group:
        """The end of the text that fits the terminal, with the figures below it."""
        width, height = self.console.size
        lines = paint(self.pieces[-TAIL:], self.colour).wrap(self.console, width)
        return Group(*lines[-max(1, height - 4) :], Text(), Text(self.status(), style="bold"))
