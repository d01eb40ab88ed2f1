"""The text of single tokens, as a reader meets it: what each one adds to the text before it.

A token's own text is not what the tokenizer says of it alone: some tokenizers drop the space before a first word, and
a character outside ASCII may be spread over several tokens. Decoding a short window with and without the token gives
what it adds; a token that ends inside a character adds nothing, the one that completes it adds the character.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from redraft.decode.requests import Generation, Round

WINDOW = 8


class TokenText:
    """Pieces of text of one growing sequence. ``context`` are the tokens before it, as in a prompt."""

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(context[-WINDOW:])
        self.start, self.read = 0, len(self.ids)

    def push(self, token: int) -> str:
        """What ``token`` adds to the text; empty while a character is incomplete."""
        self.ids.append(token)
        before, after = self._decode(self.start, self.read), self._decode(self.start, len(self.ids))
        if after.endswith("\N{REPLACEMENT CHARACTER}") and len(self.ids) - self.read < WINDOW:
            return ""
        # What was read keeps its place, so that a tokenizer that trims the beginning trims the same both times.
        self.start, self.read = self.read, len(self.ids)
        return after[len(before) :]

    def peek(self, tokens: Sequence[int]) -> list[str]:
        """What ``tokens`` would add, one after the other, without adding them."""
        ahead = copy.copy(self)
        ahead.ids = list(self.ids)
        return [ahead.push(token) for token in tokens]

    def proposed(self, record: Round) -> list[str]:
        """The text of a round's proposals: a chain's tokens follow each other, a tree's stand alone."""
        if record.depth == len(record.proposed):
            return self.peek(record.proposed)
        return [self.peek([token])[0] for token in record.proposed]

    def _decode(self, start: int, end: int) -> str:
        return str(
            self.tokenizer.decode(
                self.ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )  # fmt: skip


def trace(tokenizer: Any, prompt_ids: Sequence[int], generation: Generation) -> dict[str, Any]:
    """One draft's entry of a result's ``traces`` (docs/formats.md): the pieces of the response, and its rounds."""
    text = TokenText(tokenizer, prompt_ids)
    ids = generation.ids
    tokens, rounds, at = [text.push(token) for token in ids[:1]], [], 1
    for record in generation.rounds:
        kept = len(record.kept)
        rounds.append(
            {"accepted": record.accepted, "kept": kept, "full": record.full, "proposed": text.proposed(record)}
        )
        tokens += [text.push(token) for token in ids[at : at + kept]]
        at += kept
    return {"tokens": tokens, "rounds": rounds}
