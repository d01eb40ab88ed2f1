"""The benchmark over HTTP: any OpenAI-compatible servers, plain and with drafts, at batch 1 and under load.

At concurrency 1 every prompt is asked of every server before the next one, in an order that rotates, and the
counters are read before and after each request, so that intervals over prompts hold for speed and for tau. Servers
that have to run one after another (one machine cannot hold them at once) are paired by prompt across their runs.
Higher concurrencies follow one after another; there only totals exist, and no intervals.

What a client sees is measured: speed counts from sending a request to the end of its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from redraft.errors import UserError
from redraft.evaluate.counters import ENGINES, ROUNDS, VLLM, total
from redraft.evaluate.load import Level, ServerConfig, Session, paired
from redraft.evaluate.server_result import PLAIN, Contestant, server_result
from redraft.evaluate.speed import Prompt, Tick

# Starts a server and gives its address; leaving the context stops it.
Starter = Callable[[], AbstractContextManager[str]]
Server = str | Starter


def bench_servers(
    servers: Mapping[str, Server],
    prompts: Sequence[Prompt],
    config: ServerConfig,
    target: str,
    provenance: Mapping[str, Any],
    tick: Tick | None = None,
) -> dict[str, Any]:
    """The result as plain JSON values (schema ``redraft.bench/1``, docs/formats.md).

    ``servers`` maps names to addresses, or to functions that start a server; if one of them starts, all run one after
    another. The one called ``plain`` decodes without a draft and is the baseline; the others must have counters of
    speculation. ``target`` is named in the result. ``tick(requests, what)`` follows the work.

    Raises ``UserError``, in one line, for bad input and for whatever the servers do wrong.
    """
    if not servers:
        raise UserError("no server to measure; name one, such as aligned=http://127.0.0.1:8000")
    if len(prompts) < max(config.concurrencies):
        raise UserError(
            f"{max(config.concurrencies)} requests at a time need as many prompts, and there are {len(prompts)}; "
            "give more prompts or a lower concurrency"
        )
    one_by_one = any(callable(server) for server in servers.values())
    measured = (_after_each_other if one_by_one else _together)(servers, prompts, config, _counting(tick))
    return server_result(measured, prompts, config, target, provenance, one_by_one)


# -- measuring -------------------------------------------------------------------------------------------------------
def _counting(tick: Tick | None) -> Callable[[str], None]:
    count = 0

    def done(what: str) -> None:
        nonlocal count
        count += 1
        if tick:
            tick(count, what)

    return done


def _together(
    servers: Mapping[str, Server], prompts: Sequence[Prompt], config: ServerConfig, done: Callable[[str], None]
) -> dict[str, Contestant]:
    with ExitStack() as stack:
        sessions = []
        for name, url in servers.items():
            session = Session(name, str(url), config).open(prompts)
            stack.callback(session.close)
            sessions.append(session)
        return _levels(sessions, prompts, config, done)


def _after_each_other(
    servers: Mapping[str, Server], prompts: Sequence[Prompt], config: ServerConfig, done: Callable[[str], None]
) -> dict[str, Contestant]:
    found: dict[str, Contestant] = {}
    for name, server in servers.items():
        with ExitStack() as stack:
            url = stack.enter_context(server()) if callable(server) else server
            session = Session(name, url, config).open(prompts)
            stack.callback(session.close)
            found |= _levels([session], prompts, config, done)
    return found


def _levels(
    sessions: Sequence[Session], prompts: Sequence[Prompt], config: ServerConfig, done: Callable[[str], None]
) -> dict[str, Contestant]:
    """Every level of servers that are up, the lowest first. Raises ``UserError``."""
    levels: dict[str, dict[int, Level]] = {session.name: {} for session in sessions}
    for concurrency in sorted(config.concurrencies):
        for session in sessions:
            session.warm(prompts, concurrency)
            _check_counters(session)
        if concurrency == 1:
            found = paired(sessions, prompts, done)
        else:
            found = {session.name: session.level(prompts, concurrency, done) for session in sessions}
        for session in sessions:
            level = found[session.name]
            _check_level(session, level)
            levels[session.name][concurrency] = level
    return {
        s.name: Contestant(s.name, levels[s.name], s.engine, s.version, s.model, [*s.notes, *_notes(s, levels[s.name])])
        for s in sessions
    }


def _check_counters(session: Session) -> None:
    """Raise ``UserError`` before any measuring when acceptance could not be told afterwards."""
    reading = session.read()
    if session.name == PLAIN or reading.rounds is not None:
        return
    wanted = f"{VLLM}{ROUNDS[VLLM]}"
    if reading.gauges:
        reason = f"it has only gauges ({', '.join(reading.gauges)}), of which no difference can be taken"
    elif reading.prefix:
        reason = f"{ENGINES[reading.prefix]} shows no {reading.prefix}{ROUNDS[reading.prefix]}: it runs without a draft"
    else:
        reason = f"its /metrics are missing or hold neither {wanted} nor SGLang's (which needs --enable-metrics)"
    raise UserError(
        f"the server {session.where} has no counters of speculation: {reason}; "
        f"if it decodes without a draft, call it {PLAIN}={session.connection.url}"
    )


def _check_level(session: Session, level: Level) -> None:
    rounds = total(level.counts).rounds if level.counts else None
    if session.name == PLAIN and rounds:
        raise UserError(f"the server {session.where} is called {PLAIN} but drafts; start it without speculation")
    if session.name != PLAIN and not rounds:
        raise UserError(f"the server {session.where} counted no round of speculation; does it run with its draft?")


def _notes(session: Session, levels: Mapping[int, Level]) -> list[str]:
    """What a reader of the figures must know."""
    notes = []
    for concurrency, level in levels.items():
        if not level.counts:
            notes.append(f"{session.name} has no counters: its speed alone is measured")
            break
        where = f"{session.name} at concurrency {concurrency}"
        counts = total(level.counts)
        received = sum(answer.tokens for answer in level.answers)
        if counts.generated is not None and len(level.good) == len(level.answers):
            if abs(counts.generated - received) > 0.01 * received + len(level.answers):
                notes.append(
                    f"{where}: the server generated {counts.generated} tokens, this run received {received}; "
                    "was it busy with other work?"
                )
        if counts.cached:
            notes.append(f"{where}: {counts.cached} prompt tokens came from the prefix cache")
    return notes
