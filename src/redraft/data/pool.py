"""Servers of one model as one: work goes to whoever has room, and what a dead one did not answer to the others.

Every server is asked ahead of the work what it serves; one that answers and is not of the target ends the run there, by
name. A server that stops answering leaves the pool with one line, and is tried again after a pause, which grows. The
run ends when no server is left.

A request that a server refuses or gives up is asked of those that have not done so, and counts as failed when there is
none. It is at one server at a time, so that no answer is there twice. Of one server alone nothing but its name is asked
ahead, and what it gives up has failed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from redraft.data.store import Failure
from redraft.data.transport import (
    HEARD_SECONDS,
    Connection,
    Late,
    Refused,
    Transient,
    Unusable,
    excerpt,
    listed,
    persist,
)
from redraft.errors import UserError

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Say = Callable[[str], None]

LONGEST_PAUSE = 30.0
# Requests given up in a row by which a server is gone, where fewer are under way.
GIVEN_UP = 3
# Seconds until a server that left is tried again: at first, and at most; and what it then has to say what it serves.
AWAY_SECONDS, AWAY_LONGEST, KNOCK_SECONDS = 10.0, 300.0, 10.0
# Attempts at a server of several before the work begins without it.
KNOCKS = 3


class Gone(UserError):
    """No server answers."""


class Server:
    """One server of a pool, and how it has done."""

    def __init__(self, url: str, concurrency: int, timeout: float) -> None:
        self.connection = Connection(url, concurrency, timeout)
        self.url, self.concurrency = self.connection.url, concurrency
        self.model: str | None = None
        self.stop = threading.Event()
        self.answered, self.unusable = False, ""
        self.met = self.there = False  # whether it was asked what it serves; whether it is in the pool
        # One that came back gets one request, until that is answered.
        self.proven = True
        self.under_way = self.given_up = self.contradicted = 0
        self.due, self.pause, self.why = 0.0, AWAY_SECONDS, ""

    @property
    def room(self) -> int:
        return (self.concurrency if self.proven else 1) - self.under_way if self.there else 0

    def open(self) -> None:
        self.stop.clear()
        self.connection.open()

    def close(self) -> None:
        self.stop.set()
        self.connection.close()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the server makes of a body for ``/v1/completions``. Raises as :meth:`Connection.json`."""
        value = self.connection.json("POST", "/v1/completions", body | {"model": self.model})
        self.connection.check_model(value, self.model)
        return value


@dataclass
class Job(Generic[Item]):
    """A request, and what became of it at servers that did not answer it."""

    key: str
    item: Item
    tried: dict[Server, Failure] = field(default_factory=dict)

    def failure(self) -> Failure:
        """What all of them said."""
        said = list(dict.fromkeys(failure.reason for failure in self.tried.values()))
        reason = said[0]
        if len(said) > 1:
            reason = "; ".join(f"{server.url}: {failure.reason}" for server, failure in self.tried.items())
        return Failure(self.key, reason, all(failure.permanent for failure in self.tried.values()))


class Pool:
    """Servers at ``urls`` (with or without ``/v1``), all of which serve the target.

    ``model`` is its served name; without it each is asked and must serve exactly one, of the same name. ``concurrency``
    requests are under way at each; they have ``timeout`` seconds an attempt and ``attempts`` attempts there, with
    pauses of ``backoff`` seconds, doubled every time. Who leaves and comes back is told to ``say``.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None = None,
        concurrency: int = 32,
        timeout: float = 300.0,
        attempts: int = 5,
        backoff: float = 0.5,
        say: Say | None = None,
    ) -> None:
        self.model, self.named = model, model is not None
        self.concurrency, self.timeout, self.attempts, self.backoff = concurrency, timeout, attempts, backoff
        self.servers = [Server(url, concurrency, timeout) for url in urls]
        self.say = say or (lambda text: None)

    @property
    def several(self) -> bool:
        return len(self.servers) > 1

    @property
    def url(self) -> str:
        """Where they are, for a message."""
        return ", ".join(server.url for server in self.servers)

    def ask(
        self, items: Sequence[tuple[str, Item]], attempt: Callable[[Item, Server], Outcome]
    ) -> Iterator[Outcome | Failure]:
        """What ``attempt`` makes of every (key, item) at one of the servers, or a failure, as they finish.

        Raises ``UserError`` when no server answers, or one is not of the target. As many given up in a row as are under
        way at a server, and ``GIVEN_UP`` at least, mean that it is gone. Where it has said nothing yet but that it
        cannot be used, fewer do, and end the run.
        """
        if not items:
            return
        if not any(server.there for server in self.servers):
            for server in self.servers:
                server.met = False
        threads = ThreadPoolExecutor((self.concurrency + 1) * len(self.servers), thread_name_prefix="redraft-server")
        try:
            for server in self.servers:
                server.given_up = 0
                server.open()
            self._meet(threads)
            yield from _Work(self, threads, items, attempt).outcomes()
        finally:
            for server in self.servers:
                server.stop.set()
            # Who is told to end does not wait for answers that are under way, and nobody for those who are away.
            away = not all(server.there for server in self.servers)
            threads.shutdown(wait=sys.exc_info()[0] is None and not away, cancel_futures=True)
            for server in self.servers:
                server.close()

    # -- who serves what -----------------------------------------------------------------------------------------
    def _meet(self, threads: ThreadPoolExecutor) -> None:
        """Ask who was not asked yet what it serves. Raises ``UserError`` that names one which is not of the target."""
        new = [server for server in self.servers if not server.met]
        if not self.several:
            self.model = self.model or self.name_at(new[0], new[0].connection, self.attempts)
            self._admit(new)
            return
        asked = {server: threads.submit(self.knock, server, min(KNOCKS, self.attempts)) for server in new}
        names, gone = dict[Server, str](), dict[Server, Gone]()
        for server, future in asked.items():
            while not future.done():
                wait([future], HEARD_SECONDS)
            try:
                names[server] = future.result()
            except Gone as error:
                gone[server] = error
        first = next((server for server in self.servers if server in names), None)
        for server, name in names.items():
            if first is not None and name != (self.model or names[first]):
                raise UserError(
                    f"the server at {server.url} serves {excerpt(name)} and the one at {first.url} "
                    f"{excerpt(names[first])}; name servers of the target alone, all of which serve it by one name"
                )
        if first is not None:
            self.model = self.model or names[first]
        self._admit(list(names))
        for server, why in gone.items():
            server.met = True
            self.send_away(server, str(why))

    def _admit(self, servers: Sequence[Server]) -> None:
        for server in servers:
            server.met = server.there = True
            server.model = self.model

    def knock(self, server: Server, attempts: int) -> str:
        """The target's name at a server of several. Raises as :meth:`name_at`."""
        found = Connection(server.url, 1, min(self.timeout, KNOCK_SECONDS))
        found.open()
        try:
            return self.name_at(server, found, attempts)
        finally:
            found.close()

    def name_at(self, server: Server, connection: Connection, attempts: int) -> str:
        """The target's name at a server. Raises ``Gone`` where it does not answer, ``UserError`` where it is not the
        target's."""
        try:
            names = persist(connection.served_models, attempts, self.backoff, LONGEST_PAUSE, server.stop.wait)
        except (Unusable, Refused) as error:
            if self.named and self.model:  # not all servers list what they serve
                return self.model
            if isinstance(error, Unusable):
                raise UserError(str(error)) from error
            raise UserError(f"the server at {server.url} cannot be used: {error}; is it up?") from error
        except Transient as error:
            raise Gone(f"the server at {server.url} cannot be used: {error}; is it up?") from error
        if self.model is None:
            return connection.the_model(names)
        if self.model not in names:
            raise UserError(
                f"the server at {server.url} serves {listed(names)} and not {excerpt(self.model)}; serve the target "
                "there by that name, or leave the server out"
            )
        return self.model

    # -- who comes and goes --------------------------------------------------------------------------------------
    def send_away(self, server: Server, why: str) -> None:
        """Take a server out of the pool for a while. Raises ``Gone`` where none is left."""
        server.there, server.why = False, why
        server.close()
        left = any(other.there for other in self.servers)
        if not left:
            raise Gone("; ".join(other.why for other in self.servers))
        server.due = time.monotonic() + server.pause
        self.say(f"{why}; its requests are asked of the other servers, and it is tried again in {server.pause:.0f} s")
        server.pause = min(2 * server.pause, AWAY_LONGEST)

    def take_back(self, server: Server) -> None:
        """A server that left is in the pool again, with one request until it has answered."""
        server.open()
        self._admit([server])
        server.proven, server.given_up = False, 0
        self.say(f"the server at {server.url} answers again")


class _Work(Generic[Item, Outcome]):
    """The items of one call, handed out and taken in by one thread."""

    def __init__(
        self,
        pool: Pool,
        threads: ThreadPoolExecutor,
        items: Sequence[tuple[str, Item]],
        attempt: Callable[[Item, Server], Outcome],
    ) -> None:
        self.pool, self.threads, self.attempt = pool, threads, attempt
        self.new: Iterator[Job[Item]] = (Job(key, item) for key, item in items)
        self.again = deque[Job[Item]]()
        self.running = dict[Future[Outcome | Failure], tuple[Server, Job[Item]]]()
        self.knocks = dict[Future[str], Server]()
        self.few = min(GIVEN_UP, len(items))

    def outcomes(self) -> Iterator[Outcome | Failure]:
        """As :meth:`Pool.ask`."""
        while True:
            yield from self._hand_out()
            if not self.running:
                return
            asked: list[Future[Any]] = [*self.running, *self.knocks]
            done, _ = wait(asked, HEARD_SECONDS, FIRST_COMPLETED)
            for future in done:
                if future in self.knocks:
                    self._welcome(self.knocks.pop(future), future)
                else:
                    yield from self._take(*self.running.pop(future), future.result())
            self._look_after()

    def _hand_out(self) -> Iterator[Failure]:
        """Give work to who has room, first what others did not answer. A job for which nobody is left has failed."""
        present = [server for server in self.pool.servers if server.there]
        for job in [self.again.popleft() for _ in range(len(self.again))]:
            able = [server for server in present if server not in job.tried]
            if not able:
                yield job.failure()
            elif (server := max(able, key=lambda each: each.room)).room > 0:
                self._start(server, job)
            else:
                self.again.append(job)
        while (server := max(present, key=lambda each: each.room)).room > 0:
            fresh = next(self.new, None)
            if fresh is None:
                return
            self._start(server, fresh)

    def _start(self, server: Server, job: Job[Item]) -> None:
        server.under_way += 1
        self.running[self.threads.submit(self._try, server, job)] = server, job

    def _take(self, server: Server, job: Job[Item], outcome: Outcome | Failure) -> Iterator[Outcome | Failure]:
        server.under_way -= 1
        if not isinstance(outcome, Failure):
            server.given_up, server.proven, server.pause = 0, True, AWAY_SECONDS
            self._contradict(server, job)
            yield outcome
            return
        server.given_up = 0 if outcome.permanent else server.given_up + 1
        job.tried[server] = outcome
        if self.pool.several:
            self.again.append(job)
        else:
            yield outcome
        if not server.there:
            return
        if server.unusable and not server.answered and server.given_up >= self.few:
            raise UserError(server.unusable)
        if server.given_up >= max(server.concurrency if server.proven else 1, GIVEN_UP if server.proven else 1):
            self.pool.send_away(server, f"the server at {server.url} stopped answering ({outcome.reason})")

    def _contradict(self, answered: Server, job: Job[Item]) -> None:
        """Raise ``UserError`` for a server that has answered nothing and refuses what another answers: its model has
        another vocabulary, or none of what is asked fits it."""
        for server, failure in job.tried.items():
            server.contradicted += failure.permanent
            if failure.permanent and not server.answered and server.contradicted >= self.few:
                raise UserError(
                    f"the server at {server.url} refuses what the one at {answered.url} answers ({failure.reason}); "
                    "name servers of the target alone"
                )

    def _try(self, server: Server, job: Job[Item]) -> Outcome | Failure:
        pool = self.pool

        def once() -> Outcome:
            try:
                return self.attempt(job.item, server)
            except Late as error:
                if any(other.there for other in pool.servers if other is not server and other not in job.tried):
                    raise _Passed(str(error)) from error  # who hangs holds a request no longer than once
                raise

        try:
            found = persist(once, pool.attempts, pool.backoff, LONGEST_PAUSE, server.stop.wait)
        except Refused as error:
            return Failure(job.key, str(error))
        except _Passed as error:
            return Failure(job.key, str(error), permanent=False)
        except Transient as error:
            server.unusable = str(error) if isinstance(error, Unusable) else ""
            return Failure(job.key, f"{error}, {pool.attempts} attempts", permanent=False)
        server.answered = True
        return found

    # -- who is away ---------------------------------------------------------------------------------------------
    def _look_after(self) -> None:
        """Try again who has been away for long enough, once all of its requests have ended."""
        now, asked = time.monotonic(), self.knocks.values()
        for server in self.pool.servers:
            if not server.there and server.due <= now and not server.under_way and server not in asked:
                server.stop.clear()
                self.knocks[self.threads.submit(self.pool.knock, server, 1)] = server

    def _welcome(self, server: Server, future: Future[str]) -> None:
        try:
            name = future.result()
            if self.pool.model is None:
                self.pool.model = name
        except UserError as error:
            if str(error) != server.why and not isinstance(error, Gone):
                self.pool.say(f"{error}; it stays out of the pool")
            server.why, server.due = str(error), time.monotonic() + server.pause
            server.pause = min(2 * server.pause, AWAY_LONGEST)
        else:
            self.pool.take_back(server)


class _Passed(Exception):
    """A request that another server is asked instead."""
