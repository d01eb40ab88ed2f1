"""One request on its way through a decoder: what is asked for, what is held meanwhile, and what comes back.

Shape legend: T new tokens, K*F taps side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from redraft.target import Target

# Tokens that are decoded together to see what the last of them adds.
WINDOW = 8


@dataclass
class Round:
    """One proposal and its verification.

    ``proposed`` are all proposed tokens, a tree's level by level; ``kept`` the ``accepted`` ones and one more, cut by
    the stop rule. ``overlap`` is sum_x min(target, draft) at each drafted position of a chain. ``depth`` is how many
    tokens could have been accepted (a tree's longest path), ``full`` whether the accepted path ended in a leaf, which
    makes the token after it a bonus and no correction.
    """

    proposed: list[int]
    accepted: int
    kept: list[int]
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    overlap: list[float] = field(default_factory=list)
    depth: int = 0
    full: bool = False

    def __post_init__(self) -> None:
        if not self.depth:
            self.depth = len(self.proposed)
        self.full = self.full or self.accepted == self.depth


@dataclass
class Generation:
    """Response ids (the end token included), how it ended, what it took, and the rounds where there were any."""

    ids: list[int]
    finish_reason: str
    prefill_seconds: float
    decode_seconds: float
    rounds: list[Round] = field(default_factory=list)


class Uniforms:
    """The uniforms in [0, 1) of one request: one stream, whatever the portions in which it is taken."""

    BLOCK = 256

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.block, self.at = torch.empty(0, dtype=torch.float64, device=device), 0

    def take(self, count: int) -> Tensor:
        while self.at + count > len(self.block):
            fresh = torch.rand(self.BLOCK, generator=self.generator, dtype=torch.float64).to(self.block.device)
            self.block, self.at = torch.cat([self.block[self.at :], fresh]), 0
        self.at += count
        return self.block[self.at - count : self.at]

    def put_back(self, count: int) -> None:
        """Return the last ``count`` uniforms of the portion just taken: nothing was decided with them."""
        self.at -= count


@dataclass
class Request:
    """A prompt that is being decoded: its limit and its random numbers, the target's cache, the draft's proposer, the
    response so far, and what was verified since the draft last proposed.

    ``new_ids_T`` [T] and ``new_taps_T`` [T, K*F] are as :mod:`redraft.drafts.proposing` has them.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    uniforms: Uniforms
    cache: Any
    proposer: Any
    ids: list[int]
    new_ids_T: Tensor
    new_taps_T: Tensor

    @property
    def room(self) -> int:
        """How many tokens the response may still get."""
        return self.max_new_tokens - len(self.ids)


def check_room(target: Target, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    """Raise ``ValueError`` when prompt and response do not fit the context."""
    if not prompt_ids or max_new_tokens < 1 or len(prompt_ids) + max_new_tokens > target.context:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} and a response of {max_new_tokens} tokens do not fit "
            f"a context of {target.context}"
        )


def trim(ids: list[int], ends: frozenset[int], room: int) -> tuple[list[int], str | None]:
    """The tokens up to an end token or the limit, and the reason if one of them struck."""
    for i, token in enumerate(ids[:room]):
        if token in ends:
            return ids[: i + 1], "stop"
    return (ids[:room], "length") if len(ids) >= room else (ids, None)


# -- the text of what was decoded ------------------------------------------------------------------------------------
class TokenText:
    """Pieces of text of one growing sequence. ``context`` are the tokens before it, as in a prompt.

    A token's own text is not what the tokenizer says of it alone: some tokenizers drop the space before a first word,
    and a character outside ASCII may be spread over several tokens. Decoding a short window with and without the token
    gives what it adds; a token that ends inside a character adds nothing, the one that completes it adds the character.
    """

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
        as_it_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(self.ids[start:end], **as_it_is))


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
