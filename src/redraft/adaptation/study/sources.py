"""Prompts of a study: from files, from the data folder, from named suites, or generated on the spot.

    FILE or datasets:NAME           as every command reads them
    data:math/gsm8k.train.jsonl.gz  a file of the folder that REDRAFT_DATA names
    suite:gsm8k                     an evaluation suite (docs/suites.md)
    maths:SEED                      generated maths problems with worked solutions; needs a count

``@COUNT`` behind any of them takes that many: of a file in the order of a hash, so that its own order plays no part; of
a suite its beginning, in which tasks take turns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from redraft.adaptation.models import split_prompts
from redraft.data.overlap import refuse_overlap, without_overlap
from redraft.data.prompts import Conversation, read_conversations
from redraft.data.suites import DATA_VARIABLE, load_suite
from redraft.data.suites.maths import maths_conversations
from redraft.errors import UserError
from redraft.settings.texts import DATA, MATHS, SUITE, parse_source


@dataclass
class Prompts:
    """What a target is asked: disjoint, and nothing of ``evaluation`` (by task) is trained on."""

    train: list[Conversation]
    heldout: list[Conversation]
    evaluation: dict[str, list[Conversation]]
    dropped: int


def data_file(place: str) -> Path:
    """A file of the data folder. Raises ``UserError`` when no folder is named or it lacks the file."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise UserError(f"data:{place} is a file of the data folder; set {DATA_VARIABLE} to the folder that holds it")
    path = Path(folder) / place
    if not path.is_file():
        raise UserError(f"{path} does not exist; set {DATA_VARIABLE} to the folder that holds {place}")
    return path


def read_source(text: str, longest: int | None = None, exclude: Sequence[Conversation] = ()) -> list[Conversation]:
    """The conversations of one source, none with a user turn of more than ``longest`` characters.

    ``exclude`` holds prompts that a generated source must not repeat. Raises ``UserError``, also for too few.
    """
    source = parse_source(text)
    if source.kind == MATHS:
        assert source.count is not None
        asked = {m["content"] for c in exclude for m in c.messages if m["role"] == "user"}
        found = maths_conversations(source.count, int(source.place), exclude=asked)
    elif source.kind == SUITE:
        found = [item.conversation for item in load_suite(source.place).items]
    else:
        found = read_conversations(data_file(source.place) if source.kind == DATA else source.place)
    if longest is not None:
        found = [c for c in found if max(len(m["content"]) for m in c.messages if m["role"] == "user") <= longest]
    if source.count is None:
        return found
    if len(found) < source.count:
        raise UserError(f"prompt source {text} gives {len(found)} prompts, not {source.count}; ask for fewer")
    if source.kind in (MATHS, SUITE):
        return found[: source.count]
    return sorted(found, key=lambda c: hashlib.sha256(f"0|{c.id}".encode()).hexdigest())[: source.count]


def read_sources(
    texts: Sequence[str], longest: int | None = None, exclude: Sequence[Conversation] = ()
) -> list[Conversation]:
    """All of several sources. Raises ``UserError`` when two prompts have one id."""
    found: dict[str, Conversation] = {}
    for text in texts:
        for conversation in read_source(text, longest, exclude):
            if conversation.id in found:
                raise UserError(f"prompt source {text}: id {conversation.id!r} is there twice; ids must differ")
            found[conversation.id] = conversation
    return list(found.values())


def read_prompts(
    prompts: Sequence[str],
    evaluation: dict[str, tuple[str, ...]],
    heldout: int,
    seed: int,
    longest: int | None,
    drop_overlap: bool,
) -> Prompts:
    """Training, held-out and evaluation prompts of a target.

    A training prompt that is, or nearly is, an evaluation prompt is an error; a generated one, or any with
    ``drop_overlap``, is left out and counted. Raises ``UserError``.
    """
    measured = {task: read_sources(texts, longest) for task, texts in evaluation.items()}
    everything = [conversation for part in measured.values() for conversation in part]
    if len({c.id for c in everything}) < len(everything):
        raise UserError("two evaluation prompts have the same id; name every source under one task only")
    kept, dropped = [], 0
    for text in prompts:
        found = read_sources([text], longest, everything)
        if parse_source(text).generated or drop_overlap:
            clean = without_overlap(found, everything)
            dropped += len(found) - len(clean)
            found = clean
        kept += found
    if len({c.id for c in kept}) < len(kept):
        raise UserError("two training prompts have the same id; ids must differ")
    refuse_overlap(kept, everything, "the evaluation")
    train, held, _ = split_prompts(kept, heldout, 0, seed)
    return Prompts(train, held, measured, dropped)


def first_turn(conversation: Conversation) -> Conversation:
    """The conversation up to its first user turn, without anybody's answer."""
    turns = []
    for message in conversation.messages:
        turns.append(message)
        if message["role"] == "user":
            break
    return replace(conversation, messages=[turn for turn in turns if turn["role"] != "assistant"])
