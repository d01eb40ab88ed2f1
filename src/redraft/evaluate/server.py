"""The benchmark over HTTP: any OpenAI-compatible servers, plain and with drafts, at batch 1 and under load.

At concurrency 1 every prompt is asked of every server before the next one, in an order that rotates, and the
counters are read before and after each request, so that intervals over prompts hold for speed and for tau. Servers
that have to run one after another (one machine cannot hold them at once) are paired by prompt across their runs.
Higher concurrencies follow one after another; there only totals exist, and no intervals.

What a client sees is measured: speed counts from sending a request to the end of its answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from redraft.errors import UserError
from redraft.evaluate.counters import ENGINES, ROUNDS, VLLM, contradiction, drafted_share, total
from redraft.evaluate.load import Level, ServerConfig, Session, paired
from redraft.evaluate.server_result import PLAIN, Contestant, server_result
from redraft.evaluate.speed import Prompt, Tick

# Starts a server and gives its address; leaving the context stops it.
Starter = Callable[[], AbstractContextManager[str]]
Server = str | Starter

# Shares below which a reader must know: of positions that rounds drafted, of a level's requests under way on average.
FULL_DRAFTS, BUSY = 0.99, 0.7


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
    at_once = [[item] for item in servers.items()] if one_by_one else [list(servers.items())]
    asked, measured = itertools.count(1), dict[str, Contestant]()

    def done(what: str) -> None:
        if tick:
            tick(next(asked), what)

    for group in at_once:
        with ExitStack() as stack:
            sessions = []
            for name, server in group:
                url = stack.enter_context(server()) if callable(server) else server
                sessions.append(Session(name, url, config).open(prompts))
                stack.callback(sessions[-1].close)
            measured |= _levels(sessions, prompts, config, done)
    return server_result(measured, prompts, config, target, provenance, one_by_one)


# -- measuring -------------------------------------------------------------------------------------------------------
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
    """Raise ``UserError`` for a level of which the figures would be wrong without showing it."""
    whole = total(level.counts) if level.counts else None
    rounds = whole.rounds if whole else None
    if session.name == PLAIN and rounds:
        raise UserError(f"the server {session.where} is called {PLAIN} but drafts; start it without speculation")
    if session.name == PLAIN:
        return
    if not whole or not rounds:
        raise UserError(f"the server {session.where} counted no round of speculation; does it run with its draft?")
    if fault := contradiction(whole):
        raise UserError(f"the counters of the server {session.where} contradict each other: {fault}; measure again")
    slack = 0.01 * level.received + len(level.answers)
    if whole.generated is not None and whole.generated < level.received - slack:
        raise UserError(
            f"the counters of the server {session.where} hold {whole.generated} of the {level.received} tokens that it "
            "sent: they are not those of all its processes; measure one process, or let the server put them together"
        )
    if level.failed and whole.accepted is None and not level.by_prompt:
        raise UserError(
            f"{level.failed} requests to the server {session.where} failed at concurrency {level.concurrency}, and its "
            f"counter of rounds has theirs among the others': tau cannot be told; measure again"
        )


def _notes(session: Session, levels: Mapping[int, Level]) -> list[str]:
    """What a reader of the figures must know."""
    notes = []
    for concurrency, level in levels.items():
        if not level.counts:
            notes.append(f"{session.name} has no counters: its speed alone is measured")
            break
        notes += [f"{session.name} at concurrency {concurrency}: {note}" for note in _level_notes(session, level)]
    return notes


def _level_notes(session: Session, level: Level) -> list[str]:
    notes, counts, number = [], total(level.counts), level.concurrency
    failed, received = level.failed, level.received
    if level.by_prompt:  # a failed request is in no figure, but what it left running may be
        counted = [c.generated for c, a in zip(level.counts, level.answers, strict=True) if not a.fault]
        generated = None if None in counted else sum(count or 0 for count in counted)
    else:
        generated = None if failed else counts.generated
    if generated is not None and abs(generated - received) > 0.01 * received + len(level.answers):
        notes.append(
            f"the server generated {generated} tokens, this run received {received}; was it busy with other work?"
        )
    if failed and not level.by_prompt:
        notes.append(f"{failed} requests failed; their time and their rounds are in the figures, their tokens are not")
    if counts.cached:
        notes.append(f"{counts.cached} prompt tokens came from the prefix cache")
    share = drafted_share(counts) if session.name != PLAIN else None
    if share is not None and share < FULL_DRAFTS:
        notes.append(
            f"rounds drafted {share:.0%} of their positions on average; what was not drafted counts as rejected in the "
            "acceptance by position"
        )
    if behind := level.behind(session.config.eos_ids):
        notes.append(f"{behind} answers go on behind an end token of the target; does the server know them all?")
    if number > 1 and level.in_flight < BUSY * number:
        notes.append(f"{level.in_flight:.1f} requests were under way on average; more prompts keep the server busier")
    return notes
