"""The target answers the prompts in its own words: the training text of a draft.

Token ids in, token ids out. Conversations go turn by turn: first the first turn of all of them, then the second, and
so on. For the next turn a reply is put back through the chat template as the turn that a chat server would hold of it,
without the thoughts that it would split off; reference answers in the prompt file are not used. A template that writes
the date is shown that of the run's start, which is kept beside the rows.

A run that was killed goes on where it stopped. Every draw depends on the prompt, the sampler and the seed alone, so
the outcome is that of a run that was not killed, but for rounding that depends on what shares a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from redraft.data.answers import UnclearReply, reply_message
from redraft.data.generate import Completion, Request, generate
from redraft.data.prompts import check_length, prompt_messages, user_turns
from redraft.data.server import ServerEngine as ServerEngine
from redraft.data.shapes import Conversation
from redraft.data.states import StatesEngine
from redraft.data.store import CONTEXT_FULL, Failure, Row, RowWriter, failures_path, row_key, write_failures
from redraft.data.template import at_moment, date_path, kept_moment, settings_of, template_ids, writes_date
from redraft.data.turns import RESULTS, Message
from redraft.errors import UserError
from redraft.features import FeatureKeeper, RowFeatures
from redraft.settings.sampler import Sampler
from redraft.shown import Shown, lines
from redraft.target import Facts, Target

# Answers go to the disk after a while; a kill costs no more than these seconds of work.
FLUSH_ROWS, FLUSH_SECONDS = 512, 2.0
# So many conversations are in memory at once; the last answers of a wave leave an engine with less to do than it could.
WAVE = 4096
# Features go to the disk in files of some size; a kill costs no more than these seconds of work.
FLUSH_FEATURES_BYTES, FLUSH_FEATURES_SECONDS = 256 * 2**20, 10.0

FOREIGN_RESULT = (
    "the result of a tool stands before this turn, and it answers a call that the target did not make here; "
    "give the served traffic with --responses instead"
)


class Engine(Protocol):
    """Answers prompts of token ids with token ids, in any order.

    ``among`` are all requests of the round; with ``features`` completions may bring what the target computed at taps.
    """

    def answer(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        tokenizer: Any,
        eos_ids: Sequence[int],
        among: Sequence[Request] = (),
        features: bool = False,
    ) -> Iterator[Completion | Failure]: ...


class InProcessEngine:
    """The target in this process, ``batch_size`` sequences at a time."""

    def __init__(self, target: Target | Callable[[], Target], batch_size: int = 64) -> None:
        """``target`` may be a function that opens it, which is done when there is something to answer."""
        self.open: Callable[[], Target] = target if callable(target) else lambda: target
        self.batch_size = batch_size

    def answer(self, requests: Sequence[Request], max_new_tokens: int, *_: Any, **how: Any) -> Iterator[Completion]:
        """``how``: ``among`` and ``features``, as :func:`generate` takes them."""
        return generate(self.open(), requests, max_new_tokens, self.batch_size, **how) if requests else iter(())


@dataclass
class RegenerationReport(Shown):
    """What a run did. Tokens are those of new rows; ``kept`` rows were there already, ``cut`` counts the new ones
    that ended because the engine's context was full."""

    path: Path
    new: int = 0
    kept: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    seconds: float = 0.0
    bytes_written: int = 0
    failures: list[Failure] = field(default_factory=list)

    def summary(self) -> str:
        """One line for a person."""
        rate = self.response_tokens / max(self.seconds, 1e-9)
        parts = {
            f"{self.new + self.kept:,} responses": True,
            f"{self.kept:,} of them already there": self.kept,
            f"{self.response_tokens:,} new tokens at {rate:,.0f} a second": self.new,
            f"{self.cut:,} of them cut short by the server's context; start it with a longer one": self.cut,
            f"{len(self.failures):,} failed, listed in {failures_path(self.path)}": self.failures,
        }
        return ", ".join(part for part, told in parts.items() if told)

    def __rich__(self) -> Any:
        return lines(self.summary())


@dataclass
class _Chain:
    """One conversation under one sampler, with the replies so far."""

    conversation: Conversation
    sampler: Sampler
    replies: list[Message] = field(default_factory=list)
    said: tuple[tuple[int, ...], ...] = ()
    broken: bool = False

    @property
    def key(self) -> str:
        return row_key(self.conversation.id, self.sampler.temperature, len(self.replies))

    @property
    def keys(self) -> list[str]:
        """Those of all its turns."""
        turns = range(user_turns(self.conversation))
        return [row_key(self.conversation.id, self.sampler.temperature, turn) for turn in turns]

    @property
    def open(self) -> bool:
        return not self.broken and len(self.replies) < user_turns(self.conversation)


def expected_rows(conversations: Sequence[Conversation], samplers: Sequence[Sampler]) -> int:
    """How many rows a run ends with when nothing fails."""
    return sum(user_turns(conversation) for conversation in conversations) * len(samplers)


def regenerate(
    engine: Engine,
    conversations: Sequence[Conversation],
    target: Facts,
    samplers: Sequence[Sampler],
    out_path: str | Path,
    max_new_tokens: int,
    seed: int = 0,
    progress: Callable[..., None] | None = None,
    features: FeatureKeeper | None = None,
    alone: bool = False,
) -> RegenerationReport:
    """Answer every user turn under every sampler and append the rows to ``out_path``.

    ``target`` is what ``engine`` runs. Rows that are there already are kept, and the run goes on behind them; they must
    come from the same target, prompts, sampling settings and token limit. ``progress(rows done, tokens=new tokens)`` is
    called as rows come in. ``features`` takes the features that completions bring, where its disk has room for all.
    With ``alone`` the file is of these prompts alone, as in a run directory, where all of it is trained on.
    Whatever could not be answered is in the report and in ``<name>.failures.jsonl``; the next run tries it again.

    Raises ``UserError`` for prompts that do not fit, stored rows that do not belong here, a server that stops
    answering (what was answered is kept), and when nothing at all could be answered.
    """
    if not conversations:
        raise UserError("there are no prompts to answer")
    if max_new_tokens < 1:
        raise UserError(f"the number of new tokens must be 1 or more, not {max_new_tokens}")
    if not samplers or len({row_key("", sampler.temperature) for sampler in samplers}) < len(samplers):
        raise UserError("give at least one temperature, and every temperature once")
    if len({conversation.id for conversation in conversations}) < len(conversations):
        raise UserError("two conversations have the same id; ids must differ")
    with RowWriter(out_path) as writer:
        known = settings_of(target.tokenizer)
        moment = known.moment
        if writes_date(target.tokenizer) and not known.fixed:  # the run has none of its own
            moment = kept_moment(writer.path, moment, fresh=not writer.rows)
        with at_moment(target.tokenizer, moment):
            how = engine, target, max_new_tokens, seed, writer, progress, features, alone
            return _Run(conversations, samplers, *how).finish()


@dataclass
class _Run:
    """The state of one run."""

    conversations: Sequence[Conversation]
    samplers: Sequence[Sampler]
    engine: Engine
    target: Facts
    max_new_tokens: int
    seed: int
    writer: RowWriter
    progress: Callable[..., None] | None
    features: FeatureKeeper | None
    alone: bool = False

    def __post_init__(self) -> None:
        self.tokenizer, self.target_hash = self.target.tokenizer, self.target.content_hash()
        self.stored = self.writer.rows
        self.report = RegenerationReport(self.writer.path)
        self.buffer, self.kept = list[Row](), list[RowFeatures]()
        self.kept_bytes, self.flushed = 0, time.monotonic()

    def finish(self) -> RegenerationReport:
        """All turns of all chains, a wave of them after the other. Whatever happens, finished rows and the list of
        failures reach the disk."""
        self._check_stored()
        tokens = self._survey()
        missing = len(self.stored) < expected_rows(self.conversations, self.samplers)  # else nothing is to be opened
        if self.features is not None and missing and not self.features.wants(self._most_bytes(tokens)):
            self.features = None
        if missing and isinstance(self.engine, InProcessEngine):
            self.engine.open()  # what cannot be opened is told of before anything is written
        began, size, chains = time.monotonic(), self.writer.path.stat().st_size, self._chains()
        try:
            while wave := list(islice(chains, WAVE)):
                while some := [chain for chain in wave if chain.open]:
                    self._round(some)
        except UserError as error:
            later = (chain.key for chain in chains if self.stored.get(chain.key) is None)
            self.report.failures += [Failure(key, f"not asked: {error}", permanent=False) for key in later]
            done = self.report.new + self.report.kept
            if not done:
                raise
            raise UserError(f"{error}; {done} responses are kept, the same command goes on from there") from error
        finally:
            self._flush()
            write_failures(self.writer.path, self.report.failures)
            self.report.seconds = time.monotonic() - began
            self.report.bytes_written = self.writer.path.stat().st_size - size
        if self.report.failures and not self.report.new + self.report.kept:
            raise UserError(f"none of the prompts could be answered; the first: {self.report.failures[0].reason}")
        return self.report

    def _chains(self) -> Iterator[_Chain]:
        return (_Chain(conversation, sampler) for sampler in self.samplers for conversation in self.conversations)

    def _check_stored(self) -> None:
        """Raise ``UserError`` for stored rows of another target, or (``alone``) of no prompt of this run."""
        strange = next((how.target_hash for how in self.stored.hows if how.target_hash != self.target_hash), None)
        if strange is not None:  # they would be trained on as if they were this one's
            raise UserError(
                f"{self.writer.path} holds responses of another target ({strange}, this one is "
                f"{self.target_hash}); name another file, or delete this one"
            )
        if not self.alone or not self.stored:
            return
        keys = (key for chain in self._chains() for key in chain.keys)
        if sum(self.stored.get(key) is not None for key in keys) < len(self.stored):
            own = {key for chain in self._chains() for key in chain.keys}
            strangers = sorted(key for row in self.stored if (key := row.key) not in own)
            raise UserError(
                f"{self.writer.path} holds {len(strangers)} responses that this run has no prompt for, first "
                f"{strangers[0]}: another run's, or of a prompt file that has changed; delete the file and give the "
                "same command again"
            )

    def _survey(self) -> int:
        """The tokens of all first prompts. Raises ``UserError`` for one that does not fit: a prompt that is the user's
        to mend must not be met after hours, in a later wave."""
        total = 0
        for conversation in self.conversations:
            messages = prompt_messages(conversation, [])
            if any(message["role"] in RESULTS for message in messages):
                continue
            length = len(template_ids(self.tokenizer, conversation.id, messages))
            keys = (_Chain(conversation, sampler).key for sampler in self.samplers)
            if new := next((key for key in keys if self.stored.get(key) is None), None):
                check_length(new, length, self.max_new_tokens, self.target.context)
            total += length
        return total

    # -- one turn of every conversation ------------------------------------------------------------------------------
    def _round(self, chains: Sequence[_Chain]) -> None:
        requests, everyone = list[Request](), list[Request]()
        waiting: dict[str, _Chain] = {}
        templated: dict[tuple[str, Any], list[int]] = {}
        for chain in chains:
            messages, key = prompt_messages(chain.conversation, chain.replies), chain.key
            if any(message["role"] in RESULTS for message in messages):
                self._break(chain, FOREIGN_RESULT)
                continue
            again = (chain.conversation.id, chain.said)
            try:
                if again not in templated:
                    templated[again] = template_ids(self.tokenizer, chain.conversation.id, messages)
                row = self.stored.get(key)
                if row is None:
                    check_length(key, len(templated[again]), self.max_new_tokens, self.target.context)
            except UserError as error:
                if not chain.replies:
                    raise  # the user's to mend; a later turn holds the target's own reply
                self._break(chain, str(error))
                continue
            request = Request(key, templated[again], chain.sampler, self.seed)
            everyone.append(request)
            if row is not None:
                self._keep(chain, row, request.prompt_ids)
            else:
                waiting[key] = chain
                requests.append(request)
        self._tell()
        try:
            wanted = self.features is not None
            limits = (self.max_new_tokens, self.tokenizer, self.target.eos_ids)
            for outcome in self.engine.answer(requests, *limits, among=everyone, features=wanted):
                if isinstance(outcome, Failure):
                    self._break(waiting.pop(outcome.key), outcome.reason, outcome.permanent)
                else:
                    self._take(waiting.pop(outcome.request.key), outcome)
        except UserError as error:
            self.report.failures += [Failure(key, f"not asked: {error}", permanent=False) for key in waiting]
            raise

    def _most_bytes(self, prompt_tokens: int) -> int:
        """What the features of all turns take where every answer is as long as it may be."""
        if not isinstance(self.engine, InProcessEngine | StatesEngine):
            return 0
        turns = max(map(user_turns, self.conversations))
        prompts = prompt_tokens + len(self.conversations) * self.max_new_tokens
        tokens = prompts * len(self.samplers) * turns
        if isinstance(self.engine, StatesEngine):
            return tokens * self.engine.states.token_bytes
        target = self.engine.open()
        return tokens * target.hidden_size * target.dtype.itemsize * (len(target.taps) + 1)

    def _keep(self, chain: _Chain, row: Row, prompt_ids: Sequence[int]) -> None:
        length, limit = len(row.response_ids), self.max_new_tokens
        same = {
            "prompt": row.prompt_ids == list(prompt_ids),
            "top-k": row.top_k == chain.sampler.top_k,
            "top-p": row.top_p == chain.sampler.top_p,
            "seed": row.seed == self.seed,
            "number of new tokens": length == limit or (length < limit and row.finish_reason != "length"),
        }
        if differs := [name for name, is_same in same.items() if not is_same]:
            what = " and ".join(differs)
            if differs == ["prompt"] and writes_date(self.tokenizer):
                what += f" (the template writes the date: {date_path(self.writer.path)} must hold that of the rows)"
            raise UserError(
                f"{self.writer.path}: row {row.key} was made with another {what}; name another file, or delete this one"
            )
        self.report.kept += 1
        self._reply(chain, row)

    def _take(self, chain: _Chain, completion: Completion) -> None:
        prompt_ids, reason = list(completion.request.prompt_ids), completion.finish_reason
        if reason == "length" and len(completion.response_ids) < self.max_new_tokens:
            reason = CONTEXT_FULL
            self.report.cut += 1
        drawn = completion.response_ids, chain.sampler, reason, self.target_hash
        row = Row.of(chain.conversation.id, prompt_ids, *drawn, seed=self.seed, turn=len(chain.replies))
        self.buffer.append(row)
        self.report.new += 1
        self.report.prompt_tokens += len(row.prompt_ids)
        self.report.response_tokens += len(row.response_ids)
        self._reply(chain, row)
        if self.features is not None and completion.features is not None:
            self.kept.append(RowFeatures(row, *completion.features))
            self.kept_bytes += sum(tensor.nbytes for tensor in completion.features)
        plain, waited = self.features is None, time.monotonic() - self.flushed
        full = len(self.buffer) >= FLUSH_ROWS if plain else self.kept_bytes >= FLUSH_FEATURES_BYTES
        if full or waited >= (FLUSH_SECONDS if plain else FLUSH_FEATURES_SECONDS):
            self._flush()
        self._tell()

    def _reply(self, chain: _Chain, row: Row) -> None:
        """Put the reply into the chain's history; where the answer in it cannot be told, the later turns fail."""
        chain.said = (*chain.said, tuple(row.response_ids))
        chain.replies.append({})
        if not chain.open:
            return  # nobody asks for the last reply
        try:
            chain.replies[-1] = reply_message(self.tokenizer, row.prompt_ids, row.response_ids, self.target.eos_ids)
        except UnclearReply as error:
            self._break(chain, f"the reply before it ({row.key}) cannot be put into its history: {error}")

    def _break(self, chain: _Chain, reason: str, permanent: bool = True) -> None:
        """A turn that fails takes the later turns of its conversation with it; all of them are listed."""
        chain.broken = True
        for turn in range(len(chain.replies), user_turns(chain.conversation)):
            key = row_key(chain.conversation.id, chain.sampler.temperature, turn)
            why = reason if key == chain.key else f"an earlier turn failed ({chain.key})"
            self.report.failures.append(Failure(key, why, permanent))

    def _flush(self) -> None:
        """Features first: a row on the disk has its features there, or they would be made again, a little otherwise."""
        if self.features is not None:
            self.features.put(self.kept)
        rows, self.buffer, self.kept = self.buffer, [], []
        self.kept_bytes, self.flushed = 0, time.monotonic()
        self.writer.append(rows)

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.report.new + self.report.kept, tokens=self.report.response_tokens)
