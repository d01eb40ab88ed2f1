"""What a measurement asks: prompts from a file and from suites, none of which the draft was trained on.

All of them come through the target's chat template; later turns of a suite stand behind the target's own replies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from redraft.adaptation.models import template_prompts
from redraft.data.answers import UnclearReply, reply_message
from redraft.data.overlap import refuse_overlap, trained_conversations
from redraft.data.prompts import check_length, read_conversations
from redraft.data.store import read_rows
from redraft.data.suites import Suite, SuiteItem, load_suite, run_turns
from redraft.data.template import template_ids
from redraft.data.turns import RESULTS, Message
from redraft.decode.engine import PlainDecoder
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.settings.measure import BenchSettings, ProbeSettings
from redraft.target import Target


class Questions:
    """The prompts of a measurement, from a prompt file, named suites, or both.

    Files are read at once, before anything large is loaded. Raises ``UserError`` for bad ones, for unknown categories,
    and when nothing is asked.
    """

    def __init__(self, s: BenchSettings | ProbeSettings) -> None:
        if s.prompts is None and not s.suite:
            raise UserError("nothing to measure on; give --prompts FILE or --suite NAME")
        self.settings = s
        self.conversations = read_conversations(s.prompts)[: s.limit] if s.prompts else []
        self.suites = [load_suite(text, s.data, s.limit, s.seed) for text in s.suite]

    def read(self, target: Any) -> list[Prompt]:
        """All prompts as the target's chat template makes them.

        ``target`` needs a tokenizer and a context; suites of several turns also need its weights, for its own replies.
        Raises ``UserError`` for bad prompts, and for those that a draft was trained on.
        """
        s = self.settings
        if isinstance(s, BenchSettings) and s.trained_on is not None:
            asked = [*self.conversations, *(item.conversation for suite in self.suites for item in suite.items)]
            trained = trained_conversations(read_rows(s.trained_on), target.tokenizer)
            refuse_overlap(trained, asked, " and ".join(filter(None, [s.prompts, *s.suite])))
        found = template_prompts(self.conversations, target, s.max_new_tokens)
        return found + suite_prompts(self.suites, target, s.max_new_tokens)


def suite_prompts(suites: Sequence[Suite], target: Target, max_new_tokens: int) -> list[Prompt]:
    """The prompts of the suites.

    A conversation of several user turns gives one prompt a turn. Between them stand the target's own replies, greedy
    and of at most ``max_new_tokens``, so that all contestants of a benchmark get the same prompts; this generation is
    no part of any measurement.

    Raises ``UserError`` for suites that share prompts' ids, and for a first turn that leaves no room to answer; a
    conversation ends before a turn that outgrows the context, that stands behind a tool's result, or behind a reply
    whose answer cannot be told from its thoughts.
    """
    owner: dict[str, str] = {}
    for suite in suites:
        for item in suite.items:
            if item.id in owner:
                raise UserError(f"--suite {suite.name}: prompt {item.id} is already in {owner[item.id]}; name one only")
            owner[item.id] = suite.name
    items = [item for suite in suites for item in suite.items]
    return [prompt for item in items for prompt in _turn_prompts(item, target, max_new_tokens)]


def _turn_prompts(item: SuiteItem, target: Target, max_new_tokens: int) -> list[Prompt]:
    found: list[Prompt] = []

    def reply(messages: list[Message]) -> Message:
        answer = PlainDecoder(target).generate(found[-1].ids, max_new_tokens)
        return reply_message(target.tokenizer, found[-1].ids, answer.ids, target.eos_ids)

    with contextlib.suppress(UnclearReply):
        for number, messages in enumerate(run_turns(item.conversation, reply)):
            if any(message["role"] in RESULTS for message in messages):
                break
            id = f"{item.id}#{number}" if number else item.id  # as in the keys of response rows
            ids = template_ids(target.tokenizer, id, messages)
            try:
                check_length(id, len(ids), max_new_tokens, target.context)
            except UserError:
                if number == 0:
                    raise
                break
            found.append(Prompt(id, ids, item.task, item.reference))
    return found
