"""Prompt files of every common shape, brought to one: conversations, with their tools and template arguments.

Read are JSON lines and JSON arrays of rows (:mod:`redraft.data.shapes`; docs/text.md lists the shapes); plain text with
one prompt a line (``.txt``); any of these with ``.gz``; and ``datasets:NAME``, ``datasets:NAME@SPLIT`` or
``datasets:NAME:CONFIG@SPLIT`` for a data set that the ``datasets`` library can load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from redraft.data.shapes import Conversation, Turns, parse_conversation
from redraft.data.turns import ASSISTANT, USER, Message
from redraft.errors import UserError
from redraft.inputs import loads, parse_json, read_text

HUB_PREFIX = "datasets:"


def read_conversations(
    path: str | Path, convert: Callable[[Any, int], Any] = lambda item, number: item
) -> list[Conversation]:
    """Every conversation of a prompt file or ``datasets:`` name, in order; shapes are told apart item by item.

    Items without an id are called after the file and their line. ``convert(item, number)`` may bring rows of another
    shape into a known one, leave a row out by giving None, or raise ``ValueError`` that says what is wrong with it.
    Raises ``UserError``, with file and line where there is one, also for an id that is there twice.
    """
    stem, items = stem_of(Path(path)), file_items(Path(path))
    if str(path).startswith(HUB_PREFIX):
        stem, rows = str(path).removeprefix(HUB_PREFIX), hub_rows(str(path))
        items = ((number, f"{path}: row {number}", _without_nulls(item)) for number, item in rows)
    found: list[Conversation] = []
    places: dict[str, str] = {}
    for number, place, item in items:
        try:
            if (known := convert(item, number)) is None and item is not None:
                continue
            conversation = parse_conversation(known, f"{stem}/{number}")
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error
        if conversation.id in places:
            raise UserError(f"{place}: id {conversation.id!r} is already at {places[conversation.id]}; ids must differ")
        places[conversation.id] = place
        found.append(conversation)
    if not found:
        raise UserError(f"{path} is empty; it must hold at least one prompt")
    return found


# -- files -----------------------------------------------------------------------------------------------------------
def stem_of(path: Path) -> str:
    """The file's name without ``.gz`` and its last ending; items without an id are called after it."""
    name = path.name.removesuffix(".gz")
    return name[: name.rfind(".")] if name.rfind(".") > 0 else name


def file_items(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Number, place (for messages) and value of every item of a prompt file. Raises ``UserError``."""
    text = read_text(path, "name a prompt file or datasets:NAME")
    # split("\n"), not splitlines(): JSON text may hold U+2028 and its like unescaped
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    if path.name.removesuffix(".gz").endswith(".txt"):
        for number, line in lines:
            place = f"{path}:{number}"
            with suppress(ValueError):
                if line.lstrip().startswith("{") and loads(line):
                    raise UserError(
                        f"{place}: a JSON row in a file of plain text; call the file .jsonl to have rows read"
                    )
            yield number, place, line.strip()
    elif text.lstrip().startswith("["):
        for number, item in enumerate(parse_json(text, path, 1), 1):
            yield number, f"{path}: item {number}", item
    else:
        for number, line in lines:
            yield number, f"{path}:{number}", parse_json(line, path, number)


def hub_rows(name: str, skip: int | None = None) -> Iterator[tuple[int, Any]]:
    """Number and value of every row of a ``datasets:`` name, in order; streamed from behind the first ``skip``, if any.
    Raises ``UserError`` where the library is missing or cannot read the data set."""
    place, _, split = name.removeprefix(HUB_PREFIX).partition("@")
    repository, _, config = place.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"reading {name} needs the package datasets: pip install redraft[datasets]") from error
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train", streaming=skip is not None)
        yield from enumerate(rows.skip(skip) if skip else rows, (skip or 0) + 1)
    except Exception as error:  # the library raises whatever its file systems raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read {name}: {reason}; check its name, config and split, and the network") from error


def _without_nulls(value: Any) -> Any:
    """A row without the nulls that a table's common columns put into objects that lack them, such as tools."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# -- prompts ---------------------------------------------------------------------------------------------------------
def user_turns(conversation: Conversation) -> int:
    """How many replies a conversation asks for."""
    return sum(message["role"] == USER for message in conversation.messages)


def prompt_messages(conversation: Conversation, replies: Sequence[str | Message]) -> Turns:
    """The messages that lead to reply number ``len(replies)``, with the earlier ``replies`` (texts, or assistant's
    turns) in the places of the reference answers.

    The model's own reply belongs behind every user turn, also where two follow each other. What an assistant says
    before any question is no answer to one, and stays. Raises ``ValueError`` where there is no further user turn.
    """
    messages, earlier, asked = conversation.turns(()), iter(replies), False
    for message in conversation.messages:
        if asked and message["role"] == ASSISTANT:
            continue
        messages.append(message)
        if message["role"] == USER:
            asked = True
            if (reply := next(earlier, None)) is None:
                return messages
            messages.append({"role": ASSISTANT, "content": reply} if isinstance(reply, str) else reply)
    raise ValueError(f"conversation {conversation.id} has no user turn after {len(replies)} replies")


def check_length(key: str, prompt_tokens: int, max_new_tokens: int, context: int | None) -> None:
    """Raise ``UserError`` when a prompt and its response may not fit into the target's context."""
    if context is not None and prompt_tokens + max_new_tokens > context:
        raise UserError(
            f"prompt {key} has {prompt_tokens} tokens; with up to {max_new_tokens} new ones it does not fit into the "
            f"context of {context}; shorten it or lower the number of new tokens"
        )
