"""Suites as prompts of a benchmark: through the target's chat template, later turns behind its own replies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from redraft.data.answers import UnclearReply, reply_message
from redraft.data.prompts import Message, check_length, template_ids
from redraft.data.suites import SuiteItem, load_suite, run_turns
from redraft.data.turns import RESULTS
from redraft.decode.engine import PlainDecoder
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.target import Target

Tick = Callable[[int, str], None]


def suite_prompts(
    texts: Sequence[str],
    target: Target,
    data: str | Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    tick: Tick | None = None,
) -> list[Prompt]:
    """The prompts of the suites that ``texts`` name (see :func:`redraft.data.suites.load_suite`), ``limit`` of each.

    A conversation of several user turns gives one prompt a turn. Between them stand the target's own replies, greedy
    and of at most ``max_new_tokens``, so that all contestants of a benchmark get the same prompts; this generation is
    no part of any measurement. ``tick(prompts so far, id)`` is called as prompts are made.

    Raises ``UserError`` as ``load_suite`` does, for suites that share prompts' ids, and for a first turn that leaves no
    room to answer; a conversation ends before a turn that outgrows the context, that stands behind a tool's result, or
    behind a reply whose answer cannot be told from its thoughts.
    """
    suites = [load_suite(text, data, limit, seed) for text in texts]
    owner: dict[str, str] = {}
    for suite in suites:
        for item in suite.items:
            if item.id in owner:
                raise UserError(f"--suite {suite.name}: prompt {item.id} is already in {owner[item.id]}; name one only")
            owner[item.id] = suite.name
    found: list[Prompt] = []
    for suite in suites:
        for item in suite.items:
            found += _turn_prompts(item, target, max_new_tokens)
            if tick:
                tick(len(found), item.id)
    return found


def _turn_prompts(item: SuiteItem, target: Target, max_new_tokens: int) -> list[Prompt]:
    found: list[Prompt] = []

    def reply(messages: list[Message]) -> Message:
        answer = PlainDecoder(target).generate(found[-1].ids, max_new_tokens)
        return reply_message(target.tokenizer, found[-1].ids, answer.ids, target.eos_ids)

    with contextlib.suppress(UnclearReply):
        for number, messages in enumerate(run_turns(item.conversation, reply)):
            if any(message["role"] in RESULTS for message in messages):
                break
            id = turn_id(item.id, number)
            ids = template_ids(target.tokenizer, id, messages)
            try:
                check_length(id, len(ids), max_new_tokens, target.context)
            except UserError:
                if number == 0:
                    raise
                break
            found.append(Prompt(id, ids, item.task, item.reference))
    return found


def turn_id(id: str, turn: int) -> str:
    """``id`` for the first turn, ``id#1`` for the second, as in the keys of response rows."""
    return f"{id}#{turn}" if turn else id
