"""Where an adaptation's text comes from: prompts that the target answers, questions it asks itself, or served traffic.

Whatever the source, two response files come of it, ``responses.jsonl`` to train on and ``heldout.jsonl`` of greedy
answers (or served ones) for early stopping, and prompts to measure on that neither file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from redraft.adaptation.models import Parts, split_prompts, template_prompts
from redraft.adaptation.runs import Log, add_forward
from redraft.data.overlap import refuse_overlap, same_text, trained_conversations
from redraft.data.prompts import Conversation, read_conversations
from redraft.data.regenerate import InProcessEngine, RegenerationReport, ServerEngine, expected_rows, regenerate
from redraft.data.selfprompts import SelfPromptReport, self_prompts
from redraft.data.states import StatesEngine
from redraft.data.store import Row, write_rows
from redraft.data.traces import read_traces
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.features import FeatureKeeper, FeatureStore
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.settings.sampler import Sampler, samplers_of
from redraft.target import Facts, Target

Split = tuple[list[Row], list[Row], list[Row]]


class Source:
    """The text of one run directory; the target itself is opened only where it writes here."""

    def __init__(
        self,
        config: AdaptConfig | DistillConfig,
        target: Parts,
        log: Log,
        store_of: Callable[[], FeatureStore] | None = None,
        states_of: Callable[[], StatesEngine] | None = None,
    ) -> None:
        """``store_of``: where the features of what is answered go. The target gives them here, and is tapped for it, or
        servers do: ``states_of`` makes what asks them.
        """
        self.config, self.target, self.log = config, target, log
        self.store_of, self.states_of = store_of, states_of
        # The ids of the training prompts that are answered; all of them where there is no such choice.
        self.chosen: frozenset[str] | None = None
        self.responses = config.out / "responses.jsonl"
        self.heldout = config.out / "heldout.jsonl"

    @property
    def facts(self) -> Facts:
        return self.target.facts

    def model(self) -> Target:
        """The target itself. Raises ``UserError``."""
        return self.target.model

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
        target = self.model()
        if rounded := target.rounding:
            raise UserError(
                f"{c.target} is served with quantised {rounded} and cannot write prompts here; give --prompts instead"
            )
        found, report = ask_itself(target, c.self_prompts, c.seed, c.out / "self-prompts.jsonl", c.batch_size, self.log)
        self.log.say(f"self-prompts: {report.summary()}")
        return found

    @cached_property
    def traffic(self) -> Split:
        """Served responses by purpose, as :func:`split_traffic`; both response files are written.

        The same log gives the same files, so a killed run simply reads it again. The stage ``served traffic`` counts
        the time of reading and no tokens: the responses were paid for when they were served. Raises ``UserError``.
        """
        c, target = self.config, self.facts
        assert c.responses is not None
        with self.log.stage("served traffic") as entry:
            rows = read_traces(
                c.responses,
                target.tokenizer,
                target.content_hash(),
                eos_ids=target.eos_ids,
                vocab_size=target.vocab_size,
                max_new_tokens=c.max_new_tokens,
                context=target.context,
                warn=lambda text: self.log.say(f"note on {text}"),
            )
            # A response of one token has nothing that a draft could guess.
            usable = rows.where(rows.response_tokens > 1)
            parts = split_traffic(usable, target, c.heldout_prompts, c.bench_prompts, c.seed)
            for path, part in zip((self.responses, self.heldout), parts, strict=False):
                entry.add(bytes_written=write_rows(path, part))
        train, heldout, evaluation = (f"{len(part):,}" for part in parts)
        self.log.say(
            f"served traffic: {len(rows):,} responses; {train} to train on, {heldout} held out, "
            f"{evaluation} prompts to measure on; nothing was generated"
        )
        return parts

    def write(self) -> None:
        """Both response files, complete. Raises ``UserError``; a killed run goes on."""
        c = self.config
        if c.responses:
            assert self.traffic
            return
        train, heldout, _ = self.prompts
        if self.chosen is not None:
            train = [conversation for conversation in train if conversation.id in self.chosen]
        self._answer("regenerate", train, samplers_of(c.temperatures, c.top_p), self.responses, c.server)
        self._answer("regenerate held-out", heldout, [Sampler()], self.heldout, c.server)

    def _answer(
        self, name: str, prompts: Sequence[Conversation], samplers: list[Sampler], path: Path, servers: Sequence[str]
    ) -> None:
        c, target = self.config, self.facts
        store = self.store_of() if self.store_of and (self.states_of or not servers) else None
        engine: Any = InProcessEngine(self.model, c.batch_size)
        if self.states_of:
            engine = self.states_of()
        elif servers:
            size, say = target.vocab_size, self.log.say
            engine = ServerEngine(servers, c.server_model, c.batch_size, vocab_size=size, say=say)
        report = answer(name, engine, target, prompts, samplers, path, c.max_new_tokens, c.seed, self.log, store)
        self.log.say(f"{name}: {report.summary()}")

    def evaluation(self, new_tokens: int) -> list[Prompt]:
        """The prompts to measure on, as the target reads them (of traffic token for token as they were served), with
        room for an answer of ``new_tokens``. Raises ``UserError`` for one that is too long.
        """
        if self.config.responses:
            return [Prompt(row.id, row.prompt_ids) for row in self.traffic[2]]
        return template_prompts(self.prompts[2], self.facts, new_tokens)


def split_traffic(rows: Sequence[Row], target: Facts, heldout: int, evaluation: int, seed: int) -> Split:
    """Served responses (to train on, held out, to measure on), split by the text of their prompts, so that several to
    one prompt stay together; no prompt of one part is, or nearly is, a prompt of the last.

    ``heldout`` and ``evaluation`` count different prompts; of each evaluation prompt one response is kept, which shows
    what was served and is not trained on. Raises ``UserError`` when too few different prompts are left to train on.
    """
    conversations = list(trained_conversations(rows, target.tokenizer))
    texts = {conversation.id: same_text(conversation) for conversation in conversations}
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        by_text.setdefault(texts[row.id], []).append(row)
    parts = split_prompts(conversations, heldout, evaluation, seed)
    train, kept, measured = ([by_text[same_text(c)] for c in part] for part in parts)
    return list(chain.from_iterable(train)), list(chain.from_iterable(kept)), [group[0] for group in measured]


def answer(
    name: str,
    engine: Any,
    target: Facts,
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
        told = progress.update
        report = regenerate(engine, prompts, target, samplers, path, max_new_tokens, seed, told, features, alone=True)
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
