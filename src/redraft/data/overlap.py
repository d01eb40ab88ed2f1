"""Evaluation prompts that are also training prompts: found, counted and refused.

Two tests. Prompts are the same when their words are: case, spacing, punctuation and the form of a character play no
part. A user turn of 13 words or more is nearly the same when one training prompt holds at least half of its 13-word
shingles and every number in it. 13 words is the length that GPT-3's authors used (arXiv 2005.14165, appendix C); one
training prompt must hold half of them because prompts of one kind share a beginning or an end; and the numbers must
be there because a template filled with other numbers is another problem.
"""

from __future__ import annotations

import itertools
import os.path
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from redraft.data.shapes import Conversation
from redraft.data.store import Row
from redraft.data.template import render
from redraft.data.turns import USER, asked_by_user, exchange
from redraft.errors import UserError

SHINGLE = 13
SHARE = 0.5

# Words, and the signs that carry the meaning of a formula: 2+2 is not 2-2, ice-cream is ice cream.
WORDS = re.compile(r"[^\W_]+|[+*/=<>^%−]|(?<![^\W_])-|-(?=\d)")
SENTINEL = "redraftsentinel"


@dataclass(frozen=True)
class Overlap:
    """An evaluation prompt, the training prompt it overlaps with, and the share of its shingles found there (0 to 1;
    1 for prompts of the same words)."""

    evaluation_id: str
    training_id: str
    share: float


def words(text: str) -> list[str]:
    """The words of a text, without case, spacing, punctuation and forms of characters (NFKC)."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return WORDS.findall(plain.casefold())


def numbers_of(found: Iterable[str]) -> set[str]:
    """Those of the words that have a digit."""
    return {word for word in found if any(map(str.isdigit, word))}


def _questions(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == USER]


def same_text(conversation: Conversation) -> str:
    """What makes two prompts the same prompt: the words of the user turns; the bare text where there are no words."""
    return "\n".join(" ".join(words(turn)) or turn.strip() for turn in _questions(conversation))


def find_overlap(training: Iterable[Conversation], evaluation: Sequence[Conversation]) -> list[Overlap]:
    """Every evaluation prompt that is, or nearly is, a training prompt: one entry each, with its closest match."""
    exact: defaultdict[str, list[int]] = defaultdict(list)
    holders: defaultdict[int, list[_Turn]] = defaultdict(list)
    for index, conversation in enumerate(evaluation):
        exact[same_text(conversation)].append(index)
        for turn in (_Turn(index, found) for found in _long_turns(conversation)):
            for shingle in turn.shingles:
                holders[shingle].append(turn)
    best: dict[int, Overlap] = {}

    def note(index: int, training_id: str, share: float) -> None:
        if index not in best or share > best[index].share:
            best[index] = Overlap(evaluation[index].id, training_id, share)

    for conversation in training:
        for index in exact.get(same_text(conversation), ()):
            note(index, conversation.id, 1.0)
        long = _long_turns(conversation)
        shared = Counter(turn for shingle in _shingles(long) for turn in holders.get(shingle, ()))
        for turn, count in shared.items():
            share = count / len(turn.shingles)
            if share >= SHARE and turn.numbers.issubset(itertools.chain.from_iterable(long)):
                note(turn.index, conversation.id, share)
    return [best[index] for index in sorted(best)]


class _Turn:
    """A user turn of evaluation prompt number ``index``: its shingles, and the words with a digit in them."""

    def __init__(self, index: int, found: Sequence[str]) -> None:
        self.index, self.shingles, self.numbers = index, _shingles([found]), numbers_of(found)


def _long_turns(conversation: Conversation) -> list[list[str]]:
    """The words of every user turn that has a shingle."""
    return [found for found in map(words, _questions(conversation)) if len(found) >= SHINGLE]


def _shingles(turns: Iterable[Sequence[str]]) -> set[int]:
    """The hashes of all 13-word shingles."""
    return {hash(window) for found in turns for window in zip(*(found[i:] for i in range(SHINGLE)), strict=False)}


def refuse_overlap(training: Iterable[Conversation], evaluation: Sequence[Conversation], where: str) -> None:
    """Raise ``UserError`` when a prompt of ``where``, to be measured on, is or nearly is one to be trained on."""
    found = find_overlap(training, evaluation)
    if not found:
        return
    listed = ", ".join(f"{o.evaluation_id} is {'' if o.share == 1 else 'nearly '}{o.training_id}" for o in found[:3])
    raise UserError(
        f"{len(found)} of the {len(evaluation)} prompts of {where} are also in the training prompts ({listed}"
        f"{', ...' if len(found) > 3 else ''}), so the figures would be too good; remove them from the training "
        "prompts, or measure on others"
    )


def without_overlap(training: Sequence[Conversation], evaluation: Sequence[Conversation]) -> list[Conversation]:
    """The training prompts that are not, and not nearly, evaluation prompts."""
    rest = list(training)
    while near := {overlap.training_id for overlap in find_overlap(rest, evaluation)}:
        rest = [conversation for conversation in rest if conversation.id not in near]
    return rest


def trained_conversations(rows: Iterable[Row], tokenizer: Any) -> Iterator[Conversation]:
    """The user turns of a response file's prompts as conversations, for :func:`refuse_overlap`; once a prompt.

    What the chat template writes around them is cut off, and with it system turns and tools, which all prompts of a
    service share. A prompt that does not show the template's marks is taken whole.
    """
    opening, closing = _user_marks(tokenizer)
    once: dict[tuple[str, int], Row] = {}
    for row in rows:
        once.setdefault((row.id, row.turn), row)
    for row in once.values():
        text = tokenizer.decode(row.prompt_ids, skip_special_tokens=False)
        turns = [turn.partition(closing)[0] for turn in text.split(opening)[1:]] if opening and closing else []
        turns = turns or [tokenizer.decode(row.prompt_ids, skip_special_tokens=True)]
        yield Conversation(row.id, list(map(asked_by_user, turns)))


def _user_marks(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before and behind the text of any user turn; empty where that cannot be told."""
    names = [f"{SENTINEL}{number}x" for number in range(3)]
    try:
        text = render(tokenizer, "template", [*exchange(*names[:2]), asked_by_user(names[2])], True)
    except UserError:  # it wants a system turn, or knows one question alone
        text = ""
    parts = re.split("|".join(names), text)
    if len(parts) != 4:
        return "", ""
    opening = os.path.commonprefix([parts[0][::-1], parts[2][::-1]])[::-1]
    closing = os.path.commonprefix([parts[1], parts[3]])
    return (opening, closing) if opening.strip() and closing.strip() else ("", "")
