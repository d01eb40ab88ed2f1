"""What a measurement asks: prompts from a file and from suites, none of which the draft was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft.adaptation.models import template_prompts
from redraft.adaptation.suites import suite_prompts
from redraft.data.overlap import refuse_overlap, trained_conversations
from redraft.data.prompts import Conversation, read_conversations
from redraft.data.store import read_rows
from redraft.data.suites import load_suite
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.registries import SUITES


@dataclass(frozen=True)
class Questions:
    """Where the prompts of a benchmark come from: a prompt file, named suites, or both; ``limit`` of each."""

    prompts: str | None = None
    suites: Sequence[str] = ()
    data: Path | None = None
    limit: int = 24
    trained_on: Path | None = None

    @cached_property
    def conversations(self) -> list[Conversation]:
        """Those of the prompt file. Raises ``UserError`` for a bad file or suite name, and when nothing is asked."""
        if self.prompts is None and not self.suites:
            raise UserError("nothing to measure on; give --prompts FILE or --suite NAME")
        for text in self.suites:
            SUITES.get(text.partition("=")[0].partition(":")[0].strip())
        return read_conversations(self.prompts)[: self.limit] if self.prompts else []

    def read(self, target: Any, max_new_tokens: int, seed: int) -> list[Prompt]:
        """All prompts as the target's chat template makes them.

        ``target`` needs a tokenizer and a context; suites of several turns also need its weights, for its own replies.
        Raises ``UserError`` for no prompts, bad ones, and those that ``trained_on`` (responses) holds as well.
        """
        if self.trained_on is not None:
            self._refuse_overlap(target, seed)
        found = template_prompts(self.conversations, target, max_new_tokens)
        return found + suite_prompts(self.suites, target, self.data, self.limit, max_new_tokens, seed)

    def _refuse_overlap(self, target: Any, seed: int) -> None:
        assert self.trained_on is not None
        asked = list(self.conversations)
        for text in self.suites:
            asked += [item.conversation for item in load_suite(text, self.data, self.limit, seed).items]
        trained = trained_conversations(read_rows(self.trained_on), target.tokenizer)
        refuse_overlap(trained, asked, " and ".join(filter(None, [self.prompts, *self.suites])))
