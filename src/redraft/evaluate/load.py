"""Load on one OpenAI-compatible server, as a client sees it: answers with their times, levels of concurrency.

Prompts go to ``/v1/completions`` as token ids, always in the same order, in a closed loop: each of n workers asks its
next prompt when its last one is answered. Nothing that is measured is tried again; a request that fails is counted as
failed. What is asked around it is: the model, how the server streams, its counters, the requests that warm it up.

Times of a request, in seconds from sending it: ``first`` token, ``last`` token, ``seconds`` until the stream has
ended. Inter-token latency is (last - first) / (tokens - 1): a speculative server sends several tokens at once, so the
gaps between messages would be those of rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redraft.data import transport
from redraft.data.generate import Request
from redraft.data.transport import HEARD_SECONDS, Connection, Refused, Transient, Unusable, excerpt, listed, persist
from redraft.errors import UserError
from redraft.evaluate.counters import (
    ENGINES,
    SGLANG,
    VLLM,
    Counts,
    Reading,
    backwards,
    difference,
    overdone,
    parse_metrics,
)
from redraft.evaluate.speed import Prompt
from redraft.evaluate.streams import Answer, read_answer
from redraft.settings.sampler import Sampler

SETTLE_SECONDS = 1.0
VERSION_PATHS = {VLLM: "/version", SGLANG: "/server_info"}
# What is asked around a measurement: attempts at it, seconds between them, and readings of counters that are compared.
ATTEMPTS, PAUSE, READINGS = 4, 0.1, 5

Done = Callable[[str], None]
Found = TypeVar("Found")


@dataclass(frozen=True)
class ServerConfig:
    """``concurrencies``: the levels, each with at least as many prompts. ``warmup``: requests before a level that are
    not counted, of ``warmup_tokens`` at most; never fewer than the level's workers. ``timeout``: seconds for an
    answer (:class:`~redraft.data.transport.Connection`). ``tolerated``: share of requests that may fail before the run
    does; one may in any case. ``model``: the served name where a server has several. ``eos_ids`` and ``vocab_size``:
    the target's end tokens and the number of its token ids, where they are known.

    Raises ``UserError`` for values that make no sense.
    """

    sampler: Sampler = field(default_factory=Sampler)
    max_new_tokens: int = 128
    seed: int = 0
    concurrencies: tuple[int, ...] = (1,)
    warmup: int = 2
    warmup_tokens: int = 16
    timeout: float = 300.0
    tolerated: float = 0.03
    model: str | None = None
    eos_ids: tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        levels = self.concurrencies
        if not levels or min(levels) < 1 or len(set(levels)) != len(levels):
            named = ", ".join(map(str, levels)) or "none"
            raise UserError(f"concurrencies must be different whole numbers from 1 on, not {named}")


@dataclass
class Level:
    """What one server did at one concurrency: an answer a prompt, in their order.

    ``counts`` holds one difference of the counters a prompt at concurrency 1, else one for the whole level; it is
    empty where the server has no counters. ``gauges`` are as last seen.
    """

    concurrency: int
    answers: list[Answer]
    wall: float
    counts: list[Counts]
    gauges: dict[str, float] = field(default_factory=dict)

    @property
    def by_prompt(self) -> bool:
        """Whether every prompt has counts of its own."""
        return self.concurrency == 1

    @property
    def in_flight(self) -> float:
        """Requests under way on average: at the end of a level some workers have nothing left to ask."""
        return sum(answer.seconds for answer in self.answers) / self.wall if self.wall else 0.0

    @property
    def good(self) -> list[Answer]:
        """The answers that did not fail."""
        return [answer for answer in self.answers if not answer.fault]

    @property
    def failed(self) -> int:
        """How many answers failed."""
        return len(self.answers) - len(self.good)

    @property
    def received(self) -> int:
        """Output tokens that came."""
        return sum(answer.tokens for answer in self.answers)


class Session:
    """A server under measurement: its connection, what it says of itself, its ``levels`` by concurrency and what a
    reader of them must know (``notes``). Use :meth:`open` first."""

    def __init__(self, name: str, url: str, config: ServerConfig) -> None:
        self.name, self.config = name, config
        self.connection = Connection(url, max(config.concurrencies) + 1, config.timeout)
        self.model = ""
        self.streamed = True
        self.engine = ""
        self.version: str | None = None
        self.levels: dict[int, Level] = {}
        self.notes: list[str] = []
        self._metrics = True
        self._last: Reading | None = None

    def open(self, prompts: Sequence[Prompt]) -> Session:
        """Connect, find the model, find out how the server counts tokens, look for its counters.

        Raises ``UserError`` in one line for a server that cannot be used.
        """
        try:
            self.connection.open()
            self.model = self._find_model()
            self._find_mode(prompts[0])
            self.engine = self.steady().prefix
            self.version = self._version()
        except BaseException as error:
            self.close()
            if isinstance(error, Unusable):
                raise UserError(str(error)) from error
            if isinstance(error, Transient | Refused):
                raise UserError(f"the server {self.where} cannot be used: {error}; is it up?") from error
            raise
        return self

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    @property
    def where(self) -> str:
        """The name and address of the server, for messages."""
        return f"{self.name} at {self.connection.url}"

    @property
    def base(self) -> Level:
        """The level that the headline is of: concurrency 1, or the lowest."""
        return self.levels[min(self.levels)]

    @property
    def product(self) -> str:
        """``vLLM 0.32.0``, as far as it is known."""
        return " ".join(filter(None, [ENGINES.get(self.engine, "unknown engine"), self.version]))

    def _find_model(self) -> str:
        wanted = self.config.model
        names = patiently(self.connection.served_models)
        if wanted is None:
            return self.connection.the_model(names)
        if wanted not in names:
            raise UserError(f"the server {self.where} serves {listed(names)}, not {wanted}")
        return wanted

    def _find_mode(self, prompt: Prompt) -> None:
        """One short request decides: a stream where it comes with token counts, else whole answers."""
        fault, limit = "", min(4, self.config.max_new_tokens)
        for self.streamed in (True, True, False):  # one odd answer does not say that it cannot
            try:
                patiently(lambda: self._ask(prompt, 0, limit))
            except Refused as error:
                fault = fault or str(error)
                continue
            if not self.streamed:
                self.notes.append(f"{self.name} does not stream with token counts ({fault}): no times of tokens")
            return
        raise UserError(f"the server {self.where} refuses a request: {fault}")

    def _version(self) -> str | None:
        """The engine's version where it tells; None is no fault."""
        try:
            path = VERSION_PATHS[self.engine]
            found = patiently(lambda: self.connection.json("GET", path)).get("version")
        except (KeyError, Transient, Refused):
            return None
        return excerpt(found, 40) or None if isinstance(found, str) else None

    # -- counters ----------------------------------------------------------------------------------------------------
    def read(self) -> Reading:
        """The counters now; an empty reading from a server without ``/metrics``. Raises ``UserError``."""
        if not self._metrics:
            return Reading()
        try:
            return patiently(self._page)
        except (Unusable, Refused) as error:  # a status such as 404 or 401: it has none, or none for us
            if self._last is not None and self._last.prefix:
                raise UserError(f"the server {self.where} stopped giving its counters: {error}") from error
            self._metrics = False
            return Reading()
        except Transient as error:
            raise UserError(f"the server {self.where} does not give its counters: {error}") from error

    def _page(self) -> Reading:
        text = self.connection.text("GET", "/metrics")
        try:
            return parse_metrics(text)
        except UserError as error:
            if isinstance(error.__cause__, ImportError):
                raise
            raise Transient(str(error)) from error  # the next page may be whole

    def steady(self) -> Reading:
        """The counters as two readings agree on them, or as they were read last: a single odd page would spoil what is
        counted from it on. On a server that does other work they never agree; the last one counts then."""
        found, before = self.read(), self._last
        for _ in range(READINGS):
            if found == before:
                break
            before, found = found, self.read()
        self._last = found
        return found

    def read_after(self, before: Reading, tokens: int) -> Reading:
        """The counters once they hold the ``tokens`` that came since ``before``.

        An engine may book its last step a moment after the client has it. A page that cannot be is read again. Time
        that this takes is in no figure.
        """
        deadline = time.perf_counter() + SETTLE_SECONDS
        odd = 0
        while True:
            reading = self.read()
            booked = reading.generated is None or reading.generated - (before.generated or 0) >= tokens
            plain = not (backwards(before, reading) or overdone(before, reading, tokens))
            odd += not plain
            if (plain and booked) or odd >= READINGS or time.perf_counter() > deadline:
                self._last = reading
                return reading
            time.sleep(0.02)

    # -- requests ----------------------------------------------------------------------------------------------------
    def answer(self, prompt: Prompt, index: int, max_new_tokens: int | None = None) -> Answer:
        """Ask one prompt once. A fault comes back as an answer; raises ``UserError`` where none can ever succeed."""
        began = time.perf_counter()
        try:
            return self._ask(prompt, index, max_new_tokens or self.config.max_new_tokens)
        except (Transient, Refused) as error:
            return Answer(seconds=time.perf_counter() - began, fault=str(error))

    def _ask(self, prompt: Prompt, index: int, max_new_tokens: int) -> Answer:
        request = Request(prompt.id, prompt.ids, self.config.sampler, self.config.seed + index)
        body = transport.completion_body(request, self.model, max_new_tokens)
        if self.streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        began = time.perf_counter()
        with closing(self._events("/v1/completions", body)) as events:
            return read_answer(events, body, request, began, self.config.eos_ids, self.config.vocab_size)

    def _events(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        whole = () if self.streamed else (self.connection.json("POST", path, body),)
        for event in whole or self.connection.events(path, body):
            self.connection.check_model(event, self.model)
            yield event

    def warm(self, prompts: Sequence[Prompt], concurrency: int) -> None:
        """Short requests, as many at a time as the level has workers. Raises ``UserError`` where one fails."""
        count = max(self.config.warmup, concurrency)
        asked = [prompts[i % len(prompts)] for i in range(count)]
        limit = min(self.config.warmup_tokens, self.config.max_new_tokens)
        before = self.steady()
        answers = self._at_once(asked, concurrency, limit, None)
        for prompt, answer in zip(asked, answers, strict=True):
            again = answer
            for _ in range(ATTEMPTS - 1):
                again = self.answer(prompt, 0, limit) if again.fault else again
            if again.fault:
                raise UserError(f"the server {self.where} cannot be used: {again.fault}")
        self.read_after(before, sum(answer.tokens for answer in answers))  # nothing of it is booked later

    def level(self, prompts: Sequence[Prompt], concurrency: int, done: Done | None = None) -> Level:
        """All prompts, ``concurrency`` at a time. Raises ``UserError`` when too many requests fail."""
        before = self.steady()
        began = time.perf_counter()
        answers = self._at_once(prompts, concurrency, self.config.max_new_tokens, done)
        wall = time.perf_counter() - began
        after = self.read_after(before, sum(answer.tokens for answer in answers))
        counts = [difference(before, after, self.where)] if after.prefix else []
        return Level(concurrency, answers, wall, counts, after.gauges)

    def _at_once(self, prompts: Sequence[Prompt], workers: int, limit: int, done: Done | None) -> list[Answer]:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="redraft-load")
        faults: list[str] = []
        try:
            futures = [pool.submit(self.answer, prompt, index, limit) for index, prompt in enumerate(prompts)]
            running = set(futures)
            while running:
                ended, running = wait(running, HEARD_SECONDS, FIRST_COMPLETED)
                faults += filter(None, [future.result().fault for future in ended])
                if ended and done:
                    self.check_faults(faults, len(prompts))
                    for _ in ended:
                        done(f"{self.name}, {workers} at a time")
            return [future.result() for future in futures]
        except BaseException:
            self.close()  # ends the requests under way
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def check_faults(self, faults: Sequence[str], requests: int) -> None:
        """Raise ``UserError`` where more than the tolerated share of ``requests`` failed, and more than one of several:
        one odd answer says nothing of a server."""
        if len(faults) > max(self.config.tolerated * requests, requests > 1):
            raise UserError(
                f"{len(faults)} of {requests} requests to the server {self.where} failed, more than "
                f"{self.config.tolerated:.0%}; the last: {faults[-1]}"
            )


def paired(sessions: Sequence[Session], prompts: Sequence[Prompt], done: Done | None = None) -> dict[str, Level]:
    """One request at a time: every prompt is asked of every server, in an order that rotates.

    The counters are read before and after each request. Raises ``UserError`` when too many requests fail.
    """
    levels = {session.name: Level(1, [], 0.0, []) for session in sessions}
    for index, prompt in enumerate(prompts):
        turn = index % len(sessions)
        for session in [*sessions[turn:], *sessions[:turn]]:
            level, before = levels[session.name], session.steady()
            answer = session.answer(prompt, index)
            level.answers.append(answer)
            level.wall += answer.seconds
            session.check_faults([found.fault for found in level.answers if found.fault], len(prompts))
            after = session.read_after(before, answer.tokens)
            if after.prefix:
                level.counts.append(difference(before, after, session.where))
                level.gauges = after.gauges
            if done:
                done(f"prompt {index + 1} of {len(prompts)}, {session.name}")
    for session in sessions:
        if 0 < len(levels[session.name].counts) < len(prompts):
            raise UserError(f"the server {session.where} stopped giving its counters half-way; measure again")
    return levels


def patiently(attempt: Callable[[], Found]) -> Found:
    """What a server says to something that is not measured, asked again where the answer makes no sense. Raises as
    ``attempt`` does."""
    return persist(attempt, ATTEMPTS, PAUSE, PAUSE, time.sleep)
