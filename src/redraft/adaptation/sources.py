"""Where an adaptation's text comes from: prompts that the target answers, questions it asks itself, or served traffic.

Whatever the source, two response files come of it, ``responses.jsonl`` to train on and ``heldout.jsonl`` of greedy
answers (or served ones) for early stopping, and prompts to measure on that neither file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft.adaptation.models import split_prompts, template_prompts
from redraft.adaptation.runs import Log, add_forward, supervised_rows
from redraft.adaptation.traffic import Traffic, take_traffic
from redraft.data.overlap import refuse_overlap
from redraft.data.prompts import Conversation, read_conversations
from redraft.data.regenerate import (
    InProcessEngine,
    RegenerationReport,
    ServerEngine,
    expected_rows,
    regenerate,
)
from redraft.data.selfprompts import SelfPromptReport, self_prompts
from redraft.data.store import Row
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.features import FeatureKeeper, FeatureStore
from redraft.provenance import Ledger
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.settings.sampler import Sampler, samplers_of
from redraft.target import Target


class Source:
    """The text of one run directory; ``target_of`` opens the target when it is first needed."""

    def __init__(
        self,
        config: AdaptConfig | DistillConfig,
        target_of: Callable[[], Target],
        log: Log,
        heldout_server: str | None = None,
        store_of: Callable[[], FeatureStore] | None = None,
    ) -> None:
        """``heldout_server`` answers the held-out prompts where the target itself is not at hand.

        ``store_of``: where a target in this process puts the features of what it answers; it taps the target.
        """
        self.config, self.target_of, self.log = config, target_of, log
        self.heldout_server, self.store_of = heldout_server, store_of
        # The ids of the training prompts that are answered; all of them where there is no such choice.
        self.chosen: frozenset[str] | None = None
        self.responses = config.out / "responses.jsonl"
        self.heldout = config.out / "heldout.jsonl"

    @cached_property
    def prompts(self) -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
        """(train, heldout, evaluation) of a run that generates. Raises ``UserError``."""
        c = self.config
        conversations = self._asked()
        if c.eval_prompts is None:
            return split_prompts(conversations, c.heldout_prompts, c.bench_prompts, c.seed)
        evaluation = read_conversations(c.eval_prompts)[: c.bench_prompts]
        refuse_overlap(conversations, evaluation, c.eval_prompts)
        train, heldout, _ = split_prompts(conversations, c.heldout_prompts, 0, c.seed)
        return train, heldout, evaluation

    def _asked(self) -> list[Conversation]:
        c = self.config
        if not c.self_prompts:
            assert c.prompts is not None  # the settings are checked: traffic has no prompts
            return read_conversations(c.prompts)
        target = self.target_of()
        if rounded := target.rounding:
            raise UserError(
                f"{c.target} is served with quantised {rounded} and cannot write prompts here; give --prompts instead"
            )
        found, report = ask_itself(target, c.self_prompts, c.seed, c.out / "self-prompts.jsonl", c.batch_size, self.log)
        self.log.say(f"self-prompts: {report.summary()}")
        return found

    @cached_property
    def traffic(self) -> Traffic:
        """Served responses by purpose; both response files are written."""
        c = self.config
        assert c.responses is not None
        return take_traffic(c, self.target_of(), self.responses, self.heldout, self.log)

    def write(self) -> None:
        """Both response files, complete. Raises ``UserError``; a killed run goes on."""
        c = self.config
        if c.responses:
            assert self.traffic
            return
        train, heldout, _ = self.prompts
        if self.chosen is not None:
            train = [conversation for conversation in train if conversation.id in self.chosen]
        samplers = samplers_of(c.temperatures, c.top_p)
        self._answer("regenerate", train, samplers, c.server)
        apart = self.heldout_server or (c.server if self.target_of().rounding else None)
        self._answer("regenerate held-out", heldout, [Sampler()], apart)

    def _answer(self, name: str, prompts: Sequence[Conversation], samplers: list[Sampler], server: str | None) -> None:
        c, target = self.config, self.target_of()
        store = self.store_of() if self.store_of and not server else None
        engine: Any = InProcessEngine(target, c.batch_size)
        if server:
            engine = ServerEngine(server, c.server_model, c.batch_size, vocab_size=target.vocab_size)
        path = self.responses if name == "regenerate" else self.heldout
        report = answer(
            name, engine, target, prompts, samplers, path, c.max_new_tokens, c.seed, self.log, features=store
        )
        self.log.say(f"{name}: {report.summary()}")

    def evaluation(self, new_tokens: int) -> list[Prompt]:
        """The prompts to measure on, as the target reads them, with room for an answer of ``new_tokens``.

        Raises ``UserError`` for one that is too long.
        """
        if self.config.responses:
            return self.traffic.prompts()
        return template_prompts(self.prompts[2], self.target_of(), new_tokens)


def answer(
    name: str,
    engine: Any,
    target: Target,
    prompts: Sequence[Conversation],
    samplers: Sequence[Sampler],
    path: Path,
    max_new_tokens: int,
    seed: int,
    log: Log,
    features: FeatureKeeper | None = None,
) -> RegenerationReport:
    """The target's answers to these prompts in the file ``path``, as the stage ``name``. Raises ``UserError``."""
    with log.counted(name, expected_rows(prompts, samplers), "rows") as (entry, progress):
        report = regenerate(
            engine,
            prompts,
            target,
            samplers,
            path,
            max_new_tokens,
            seed,
            progress.update,
            features,
        )
        tokens = report.prompt_tokens + report.response_tokens
        add_forward(entry, target, tokens, bytes_written=report.bytes_written)
    return report


def ask_itself(
    target: Target, count: int, seed: int, path: Path, batch_size: int, log: Log, name: str = "self-prompts"
) -> tuple[list[Conversation], SelfPromptReport]:
    """Questions that the target writes itself, as the stage ``name``; its draws in ``path``. Raises ``UserError``."""
    with log.counted(name, count) as (entry, progress):
        found, report = self_prompts(target, count, seed, path, batch_size=batch_size, progress=progress.update)
        add_forward(entry, target, report.tokens)
    return found, report


def own_answers(
    target: Target, prompts: Sequence[Conversation], sampler: Sampler, path: Path, max_new_tokens: int, seed: int = 0
) -> list[Row]:
    """The target's answers to these prompts, made once, in the file ``path``; those with an anchor, by key.

    Raises ``UserError`` for prompts that do not fit and rows in the file that do not belong there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    engine, log = InProcessEngine(target), Log(Ledger())
    answer(path.stem, engine, target, prompts, [sampler], path, max_new_tokens, seed, log)
    return sorted(supervised_rows(path), key=lambda row: row.key)
