"""Named evaluation suites: what is measured on, under one name everywhere (``--suite gsm8k``, docs/suites.md).

One file a family of suites, found by the registry. A suite reads its rows from a file that the user names
(``gsm8k=FILE``), from a data set that the user names (``gsm8k=datasets:NAME:CONFIG@SPLIT``), or from a data folder of
``<domain>/<name>.<split>.jsonl.gz`` files; nothing is fetched unless a data set is named. Rows may have the columns of
the public source or any shape of :mod:`redraft.data.prompts`. Reference answers are kept beside the prompts and never
get into one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from redraft.data.prompts import HUB_PREFIX, prompt_messages, read_conversations, user_turns
from redraft.data.shapes import Conversation
from redraft.data.turns import Message, keys_of
from redraft.errors import UserError
from redraft.registries import SUITES

DATA_VARIABLE = "REDRAFT_DATA"
KNOWN_SHAPES = frozenset({"messages", "conversations", "instruction"})


@dataclass(frozen=True)
class SuiteItem:
    """One conversation to be measured on. It ends with a user turn; between two user turns goes the model's reply.

    ``task`` is the suite's name, with ``:category`` behind it where results go by category. ``reference`` is what
    :mod:`redraft.evaluate.quality` compares an answer with.
    """

    id: str
    task: str
    conversation: Conversation
    reference: str | None = None


@dataclass(frozen=True)
class Suite:
    """What was asked for, in its order. ``source`` says where the rows were read."""

    name: str
    items: list[SuiteItem]
    licence: str
    source: str


def last_answer(conversation: Conversation) -> str | None:
    """The answer of the source, of a conversation with one user turn: later turns depend on earlier replies."""
    answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
    return answers[-1] if answers and user_turns(conversation) == 1 else None


def category_of(id: str) -> str:
    """The middle part of ``name/category/number``; empty where the id has none."""
    parts = id.split("/")
    return parts[1] if len(parts) > 2 else ""


@dataclass(frozen=True)
class SuiteDefinition:
    """How a suite is read.

    ``file``: ``<domain>/<name>.<split>`` in a data folder; ``hub``: ``NAME:CONFIG@SPLIT`` of the ``datasets`` library;
    ``home``: where the data come from. ``convert(row, number)`` brings a row with the public source's columns into
    ``{"id", "messages"}``, the source's answer last; None leaves it out. ``adopt`` may rename a conversation, or leave
    it out. ``reference`` takes the reference answer from the whole conversation. ``scoring`` names the rule of
    :mod:`redraft.evaluate.quality`. ``groups`` maps the categories in the ids to those that results go by; an empty
    one stands for the suite as a whole, and a suite without groups has no categories.
    ``make`` generates the rows where there are no files.
    """

    about: str
    licence: str
    home: str
    file: str = ""
    hub: str = ""
    scoring: str = ""
    convert: Callable[[dict[str, Any], int], dict[str, Any] | None] | None = None
    adopt: Callable[[Conversation], Conversation | None] = lambda conversation: conversation
    reference: Callable[[Conversation], str | None] = last_answer
    groups: Mapping[str, str] = field(default_factory=dict)
    make: Callable[[], list[Conversation]] | None = None

    def category(self, id: str) -> str:
        """The category of an item; empty in a suite that has none."""
        return category_of(id) if self.groups else ""

    def group(self, id: str) -> str:
        """What results of an item go by; empty for the suite as a whole."""
        category = self.category(id)
        return self.groups.get(category, category)

    def names_of(self, id: str) -> set[str]:
        """The names behind the colon that an item may be asked for by."""
        return {self.category(id), self.group(id)} - {""}


def load_suite(text: str, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0) -> Suite:
    """The suite that ``text`` asks for: ``NAME``, ``NAME:CATEGORY``, and either with ``=FILE`` or ``=datasets:...``.

    Without a file the rows come from ``data_dir``, or else from the folder that the variable REDRAFT_DATA names. The
    order depends on ``seed`` and the ids alone; ``limit`` takes the beginning of it, in which tasks take turns. Raises
    ``UserError`` for an unknown suite or category, missing data, and rows of a wrong format (with file and line).
    """
    if limit is not None and limit < 1:
        raise UserError(f"the number of prompts of a suite must be at least 1, not {limit}")
    place, equals, path = text.partition("=")
    name, colon, category = place.strip().partition(":")
    definition: SuiteDefinition = SUITES.get(name)
    if equals and not path.strip():
        raise UserError(f"--suite {text!r} names no file behind the =; write {name}=FILE")
    if definition.make is not None and not path:
        conversations, source = definition.make(), definition.home
    else:
        source = path.strip() or str(_in_folder(name, definition, data_dir))
        conversations = read_conversations(source, _converter(name, definition))
    found = [c for c in map(definition.adopt, conversations) if c is not None]
    if not found:
        raise UserError(f"{source} holds no prompt of suite {name}; its rows come from {definition.home}")
    if colon:
        known = sorted({group for c in found for group in definition.names_of(c.id)})
        if category not in known:
            among = f"choose one of: {', '.join(known)}" if known else "it has none"
            raise UserError(f"suite {name} has no category {category!r}; {among}")
        found = [c for c in found if category in definition.names_of(c.id)]
    items = [_item(name, definition, category, c) for c in found]
    return Suite(place.strip(), _arranged(items, definition, seed)[:limit], definition.licence, source)


def _arranged(items: Sequence[SuiteItem], definition: SuiteDefinition, seed: int) -> list[SuiteItem]:
    """Shuffled by ``seed`` and id, whatever the order of the file was. Tasks take turns, and within a task its
    categories do, so that any beginning has its share of each."""
    shuffled = sorted(items, key=lambda item: hashlib.sha256(f"{seed}|{item.id}".encode()).hexdigest())
    return _turns(_turns(shuffled, lambda item: definition.category(item.id)), lambda item: item.task)


def _turns(items: Sequence[SuiteItem], kind: Callable[[SuiteItem], str]) -> list[SuiteItem]:
    kinds = [[item for item in items if kind(item) == name] for name in sorted(set(map(kind, items)))]
    return [item for turn in itertools.zip_longest(*kinds) for item in turn if item is not None]


def run_turns(conversation: Conversation, reply: Callable[[list[Message]], str | Message]) -> Iterator[list[Message]]:
    """The messages that lead to each reply, turn by turn, with the model's own replies between them.

    ``reply(messages)``, a text or an assistant's turn, is asked for only when the next turn is: never for the last.
    """
    replies: list[str | Message] = []
    while True:
        yield (messages := prompt_messages(conversation, replies))
        if len(replies) + 1 == user_turns(conversation):
            return
        replies.append(reply(messages))


def suite_of(task: str) -> str:
    """The suite that a task belongs to."""
    return task.partition(":")[0]


# -- reading ---------------------------------------------------------------------------------------------------------
def _in_folder(name: str, definition: SuiteDefinition, data_dir: str | Path | None) -> Path:
    """The suite's file in the data folder, packed or not."""
    folder = data_dir or os.environ.get(DATA_VARIABLE)
    tried = [Path(folder) / (definition.file + ending) for ending in (".jsonl.gz", ".jsonl")] if folder else []
    for path in filter(Path.is_file, tried):
        return path
    why = f"{tried[0]} does not exist" if tried else "no data folder is named"
    raise UserError(
        f"no data for suite {name}: {why}; give a file of {definition.home} with --suite {name}=FILE; or a folder that "
        f"holds {definition.file}.jsonl.gz with --data FOLDER or the variable {DATA_VARIABLE}"
        + (f"; or a data set with --suite {name}={HUB_PREFIX}{definition.hub}" if definition.hub else "")
    )


def _converter(name: str, definition: SuiteDefinition) -> Callable[[Any, int], Any]:
    def convert(item: Any, number: int) -> Any:
        if definition.convert is None or not isinstance(item, dict) or item.keys() & KNOWN_SHAPES:
            return item
        try:
            return definition.convert(item, number)
        except KeyError as error:
            raise ValueError(
                f'no {error} among its keys ({keys_of(item)}); a row of suite {name} has "messages", or the columns of '
                f"{definition.home}"
            ) from error
        except (TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"a column is not of the kind that {definition.home} has ({error})") from error

    return convert


def _item(name: str, definition: SuiteDefinition, asked: str, conversation: Conversation) -> SuiteItem:
    group = asked or definition.group(conversation.id)
    turns = [m for m in conversation.messages if m["role"] != "assistant"]
    while turns[-1]["role"] != "user":
        turns.pop()
    bare, task = replace(conversation, messages=turns), f"{name}:{group}" if group else name
    return SuiteItem(conversation.id, task, bare, definition.reference(conversation))
