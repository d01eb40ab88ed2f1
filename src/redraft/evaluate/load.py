"""Load on one OpenAI-compatible server, as a client sees it: answers with their times, levels of concurrency.

Prompts go to ``/v1/completions`` as token ids, always in the same order, in a closed loop: each of n workers asks its
next prompt when its last one is answered. Nothing is tried again; a request that fails is counted as failed.

Times of a request, in seconds from sending it: ``first`` token, ``last`` token, ``seconds`` until the stream has
ended. Inter-token latency is (last - first) / (tokens - 1): a speculative server sends several tokens at once, so the
gaps between messages would be those of rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from redraft.data import transport
from redraft.data.generate import Request
from redraft.data.transport import Connection, Refused, Transient
from redraft.errors import UserError
from redraft.evaluate.counters import ENGINES, SGLANG, VLLM, Counts, Reading, difference, parse_metrics
from redraft.evaluate.speed import Prompt
from redraft.settings.sampler import Sampler

SETTLE_SECONDS = 1.0
VERSION_PATHS = {VLLM: "/version", SGLANG: "/server_info"}

Done = Callable[[str], None]


@dataclass(frozen=True)
class ServerConfig:
    """``concurrencies``: the levels, each with at least as many prompts. ``warmup``: requests before a level that are
    not counted, of ``warmup_tokens`` at most; never fewer than the level's workers. ``timeout``: seconds without a
    byte. ``tolerated``: share of requests that may fail before the run does. ``model``: the served name where a server
    has several. ``eos_ids``: the target's end tokens, where they are known.

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

    def __post_init__(self) -> None:
        levels = self.concurrencies
        if not levels or min(levels) < 1 or len(set(levels)) != len(levels):
            named = ", ".join(map(str, levels)) or "none"
            raise UserError(f"concurrencies must be different whole numbers from 1 on, not {named}")


@dataclass(frozen=True)
class Answer:
    """One request as the client saw it; ``fault`` says why it failed. ``first`` and ``last`` need a stream."""

    tokens: int = 0
    seconds: float = 0.0
    first: float | None = None
    last: float | None = None
    text: str = ""
    ids: list[int] | None = None
    fault: str = ""

    @property
    def inter_token(self) -> float | None:
        """Seconds a token after the first, None without a stream or a second token."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    def same_output(self, other: Answer) -> bool:
        """Whether two answers say the same: in token ids where both came with them, else in text."""
        if self.ids is not None and other.ids is not None:
            return self.ids == other.ids
        return self.text == other.text


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

    def open(self, prompts: Sequence[Prompt]) -> Session:
        """Connect, find the model, find out how the server counts tokens, look for its counters.

        Raises ``UserError`` in one line for a server that cannot be used.
        """
        try:
            self.connection.open()
            self.model = self._find_model()
            self._find_mode(prompts[0])
            self.engine = self.read().prefix
            self.version = self._version()
        except BaseException as error:
            self.close()
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
        names = self.connection.served_models()
        if wanted is None:
            return self.connection.the_model(names)
        if wanted not in names:
            raise UserError(f"the server {self.where} serves {', '.join(names) or 'no model'}, not {wanted}")
        return wanted

    def _find_mode(self, prompt: Prompt) -> None:
        """One short request decides: a stream where it comes with token counts, else whole answers."""
        fault = ""
        for self.streamed in (True, False):
            try:
                self._ask(prompt, 0, min(4, self.config.max_new_tokens))
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
            found = self.connection.json("GET", VERSION_PATHS[self.engine]).get("version")
        except (KeyError, Transient, Refused, UserError):
            return None
        return str(found) if found else None

    # -- counters ----------------------------------------------------------------------------------------------------
    def read(self) -> Reading:
        """The counters now; an empty reading from a server without ``/metrics``. Raises ``UserError``."""
        if not self._metrics:
            return Reading()
        try:
            text = self.connection.text("GET", "/metrics")
        except (UserError, Refused):  # a status such as 404 or 401: it has none, or none for us
            self._metrics = False
            return Reading()
        except Transient as error:
            raise UserError(f"the server {self.where} does not give its counters: {error}") from error
        return parse_metrics(text)

    def read_after(self, before: Reading, tokens: int) -> Reading:
        """The counters once they hold the ``tokens`` that came since ``before``.

        An engine may book its last step a moment after the client has it. Time that this takes is in no figure.
        """
        deadline = time.perf_counter() + SETTLE_SECONDS
        while True:
            reading = self.read()
            booked = reading.generated is None or reading.generated - (before.generated or 0) >= tokens
            if booked or time.perf_counter() > deadline or reading.started != before.started:
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
        asked = "/v1/completions", body
        events = self.connection.events(*asked) if self.streamed else [self.connection.json("POST", *asked)]
        return _read(events, body, request, began)

    def warm(self, prompts: Sequence[Prompt], concurrency: int) -> None:
        """Short requests, as many at a time as the level has workers. Raises ``UserError`` where one fails."""
        count = max(self.config.warmup, concurrency)
        asked = [prompts[i % len(prompts)] for i in range(count)]
        limit = min(self.config.warmup_tokens, self.config.max_new_tokens)
        before = self.read()
        answers = self._at_once(asked, concurrency, limit, None)
        for answer in answers:
            if answer.fault:
                raise UserError(f"the server {self.where} cannot be used: {answer.fault}")
        self.read_after(before, sum(answer.tokens for answer in answers))  # nothing of it is booked later

    def level(self, prompts: Sequence[Prompt], concurrency: int, done: Done | None = None) -> Level:
        """All prompts, ``concurrency`` at a time. Raises ``UserError`` when too many requests fail."""
        before = self.read()
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
            for future in as_completed(futures):
                faults += filter(None, [future.result().fault])
                if done:
                    self.check_faults(faults, len(prompts))
                    done(f"{self.name}, {workers} at a time")
            return [future.result() for future in futures]
        except BaseException:
            self.close()  # ends the requests under way
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def check_faults(self, faults: Sequence[str], requests: int) -> None:
        """Raise ``UserError`` where more than the tolerated share of ``requests`` failed."""
        if len(faults) > self.config.tolerated * requests:
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
            level, before = levels[session.name], session.read()
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


# -- answers ---------------------------------------------------------------------------------------------------------
def _read(events: Iterable[dict[str, Any]], body: dict[str, Any], request: Request, began: float) -> Answer:
    """The answer in the events of a stream, or in the one object of a server that does not stream.

    Raises ``Transient`` for half an answer, ``Refused`` for one without token counts.
    """
    what = "stream" if body["stream"] else "answer"
    texts: list[str] = []
    ids: list[int] = []
    times: list[float] = []
    tokens: int | None = None
    finished = with_ids = False
    for event in events:
        # some servers count an end token beside the tokens that were asked for
        found = transport.counted(event, "completion_tokens", int(body["max_tokens"]) + 1)
        tokens = tokens if found is None else found
        choice = transport.first_choice(event)
        if choice is None:
            continue
        transport.check_prompt(choice, event, request)
        text, new = transport.answer_text(choice), transport.answer_ids(choice)
        with_ids = with_ids or new is not None
        if new or text:
            times.append(time.perf_counter() - began)
            texts.append(text)
            ids += new or []
        finished = finished or choice.get("finish_reason") is not None
    seconds = time.perf_counter() - began
    if not finished:
        raise Transient(f"half an answer: the {what} ended without a finish reason")
    tokens = len(ids) if tokens is None and with_ids else tokens
    if tokens is None:
        raise Refused(f"the {what} has neither usage nor token ids; the speed of this server cannot be told")
    if tokens < 1 or (body["stream"] and not times):
        raise Transient("an answer without tokens")
    first, last = (times[0], times[-1]) if body["stream"] else (None, None)
    return Answer(tokens, seconds, first, last, "".join(texts), ids if with_ids else None)
