"""The benchmark over HTTP: any OpenAI-compatible servers, plain and with drafts, at batch 1 and under load.

At concurrency 1 every prompt is asked of every server before the next one, in an order that rotates, and the
counters are read before and after each request, so that speed and tau have bootstrap 95% intervals over prompts, paired
between servers. Servers that have to run one after another (one machine cannot hold them at once) are paired by prompt
across their runs. Higher concurrencies follow one after another; there only totals exist, and the intervals' ends are
null.

What a client sees is measured: speed counts from sending a request to the end of its answer.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from redraft.errors import UserError
from redraft.evaluate import counters
from redraft.evaluate.figures import PLAIN, Tally, by_task, gains, per_prompt
from redraft.evaluate.load import Level, ServerConfig, Session, paired
from redraft.evaluate.speed import SCHEMA, Prompt, Tick
from redraft.evaluate.statistics import bootstrap
from redraft.evaluate.streams import Answer

# Starts a server and gives its address; leaving the context stops it.
Starter = Callable[[], AbstractContextManager[str]]
Server = str | Starter

# Shares below which a reader must know: of positions that rounds drafted, of a level's requests under way on average.
FULL_DRAFTS, BUSY = 0.99, 0.7
FAULTS_LISTED = 20


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
    asked, measured = itertools.count(1), dict[str, Session]()

    def done(what: str) -> None:
        if tick:
            tick(next(asked), what)

    for group in at_once:
        with ExitStack() as stack:
            sessions = []
            for name, server in group:
                url = stack.enter_context(server()) if callable(server) else server
                measured[name] = Session(name, url, config).open(prompts)
                sessions.append(measured[name])
                stack.callback(measured[name].close)
            _measure(sessions, prompts, config, done)
    return _result(measured, prompts, config, target, provenance, one_by_one)


# -- measuring -------------------------------------------------------------------------------------------------------
def _measure(
    sessions: Sequence[Session], prompts: Sequence[Prompt], config: ServerConfig, done: Callable[[str], None]
) -> None:
    """Every level of servers that are up, the lowest first. Raises ``UserError``."""
    for concurrency in sorted(config.concurrencies):
        for session in sessions:
            session.warm(prompts, concurrency)
            check_counters(session)
        if concurrency == 1:
            found = paired(sessions, prompts, done)
        else:
            found = {session.name: session.level(prompts, concurrency, done) for session in sessions}
        for session in sessions:
            session.levels[concurrency] = found[session.name]
            check_level(session, found[session.name])
    for session in sessions:
        for concurrency, level in session.levels.items():
            if not level.counts:
                session.notes.append(f"{session.name} has no counters: its speed alone is measured")
                break
            session.notes += [f"{session.name} at concurrency {concurrency}: {note}" for note in _notes(session, level)]


def check_counters(session: Session) -> None:
    """Raise ``UserError`` before any measuring when acceptance could not be told afterwards."""
    reading = session.steady()
    if session.name == PLAIN or reading.rounds is not None:
        return
    prefix, names = reading.prefix, counters.ROUNDS
    if reading.gauges:
        reason = f"it has only gauges ({', '.join(reading.gauges)}), of which no difference can be taken"
    elif prefix:
        reason = f"{counters.ENGINES[prefix]} shows no {prefix}{names[prefix]}: it runs without a draft"
    else:
        wanted = counters.VLLM + names[counters.VLLM]
        reason = f"its /metrics are missing or hold neither {wanted} nor SGLang's (which needs --enable-metrics)"
    raise UserError(
        f"the server {session.where} has no counters of speculation: {reason}; "
        f"if it decodes without a draft, call it {PLAIN}={session.connection.url}"
    )


def check_level(session: Session, level: Level) -> None:
    """Raise ``UserError`` for a level of which the figures would be wrong without showing it."""
    whole = counters.total(level.counts)
    if session.name == PLAIN:
        if whole.rounds:
            raise UserError(f"the server {session.where} is called {PLAIN} but drafts; start it without speculation")
        return
    if not whole.rounds:
        raise UserError(f"the server {session.where} counted no round of speculation; does it run with its draft?")
    if fault := counters.contradiction(whole):
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


def _notes(session: Session, level: Level) -> list[str]:
    """What a reader of a level's figures must know."""
    notes, counts, number = [], counters.total(level.counts), level.concurrency
    failed, received = level.failed, level.received
    if level.by_prompt:  # a failed request is in no figure, but what it left running may be
        counted = [c for c, answer in zip(level.counts, level.answers, strict=True) if not answer.fault]
        generated = counters.total(counted).generated
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
    share = counters.drafted_share(counts) if session.name != PLAIN else None
    if share is not None and share < FULL_DRAFTS:
        notes.append(
            f"rounds drafted {share:.0%} of their positions on average; what was not drafted counts as rejected in the "
            "acceptance by position"
        )
    ends = session.config.eos_ids
    if behind := sum(any(i in ends for i in (answer.ids or [])[:-1]) for answer in level.good):
        notes.append(f"{behind} answers go on behind an end token of the target; does the server know them all?")
    if number > 1 and level.in_flight < BUSY * number:
        notes.append(f"{level.in_flight:.1f} requests were under way on average; more prompts keep the server busier")
    return notes


# -- figures ---------------------------------------------------------------------------------------------------------
def _result(
    measured: Mapping[str, Session],
    prompts: Sequence[Prompt],
    config: ServerConfig,
    target: str,
    provenance: Mapping[str, Any],
    one_by_one: bool,
) -> dict[str, Any]:
    """The whole result; ``one_by_one`` when the servers ran after each other."""
    plain, levels, batch = measured.get(PLAIN), sorted(config.concurrencies), min(config.concurrencies)
    drafts = {name: found for name, found in measured.items() if name != PLAIN}
    # The prompts that every server answered at its base level can be paired.
    kept = [i for i in range(len(prompts)) if not any(found.base.answers[i].fault for found in measured.values())]
    if not kept:
        faults = [answer.fault for found in measured.values() for answer in found.base.answers if answer.fault]
        raise UserError(f"no prompt was answered by every server; the last fault: {faults[-1]}; measure again")
    tallies = {name: _tally(found.base, kept) for name, found in measured.items()}
    for name, found in drafts.items():
        if found.base.by_prompt and not tallies[name].with_rounds():
            raise UserError(f"{name} drafted for none of the prompts that every server answered; give longer ones")
    widths = {len(counters.total(found.base.counts).per_position) for found in drafts.values()}
    gamma = widths.pop() if len(widths) == 1 else 0
    order = "at concurrency 1 every prompt on every server, in rotation; other levels after each other"
    if one_by_one:
        order = "one server after another; prompts are paired across their runs"
    elif batch > 1 or len(measured) == 1:
        order = "levels after each other"
    failures = [
        {"server": name, "concurrency": n, "id": prompt.id, "reason": answer.fault}
        for name, found in measured.items()
        for n, level in found.levels.items()
        for prompt, answer in zip(prompts, level.answers, strict=True)
        if answer.fault
    ]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": dict(provenance),
        "setup": {
            "target": target,
            "sampler": config.sampler.describe(),
            "shape": "chain" if gamma else "as each server is set up",
            **({"gamma": gamma} if gamma else {}),
            "prompts": len(prompts),
            "max_new_tokens": config.max_new_tokens,
            "batch": batch,
            "seed": config.seed,
            "server": ", ".join(dict.fromkeys(found.product for found in measured.values())),
            "concurrency": levels,
            "order": order,
            "speed": "output tokens a second as the client sees it, from sending a request to the end of its answer",
        },
        "drafts": {name: _summary(found.base, plain, kept) for name, found in drafts.items()},
        "gains": {},
        "per_prompt": [],
        "server": {
            "levels": [
                {"concurrency": n, **{name: _level(found, plain, n, kept) for name, found in measured.items()}}
                for n in levels
            ],
            "served": {name: {"engine": found.product, "model": found.model} for name, found in measured.items()},
            "failures": failures[:FAULTS_LISTED],
            "notes": [note for found in measured.values() for note in found.notes],
        },
    }
    if plain:
        result["plain"] = {"server": {"tokens_per_second": tallies[PLAIN].rate()}, "fastest": "server"}
    if batch == 1:
        asked = {i: (prompts[i].id, prompts[i].task) for i in kept}
        tasks = [task for _, task in asked.values()]
        result["gains"] = gains({name: tallies[name] for name in drafts})
        result["per_prompt"] = per_prompt(measured, asked, lambda name, i: _entry(measured[name], i))
        for name in drafts:
            by = by_task(tallies[name], tallies.get(PLAIN), tasks, dict.fromkeys(filter(None, tasks)))
            result["drafts"][name]["by_task"] = by
    return result


def _one(level: Level, kept: Sequence[int]) -> tuple[list[Answer], list[counters.Counts]]:
    """Answers and counts of the prompts that are compared: single ones at concurrency 1, else all."""
    if not level.by_prompt:
        return level.good, level.counts
    return [level.answers[i] for i in kept], [level.counts[i] for i in kept] if level.counts else []


def _tally(level: Level, kept: Sequence[int]) -> Tally:
    """An entry a prompt at concurrency 1, else one of totals. tau's tokens are the counters' where these have them."""
    answers, counts = _one(level, kept)
    tokens = [answer.tokens for answer in answers]
    if not level.by_prompt:
        whole = counters.total(counts)
        numerator = whole.tau_tokens(sum(tokens), len(answers))
        return Tally([sum(tokens)], [level.wall], [numerator], [whole.rounds or 0], whole=True)
    counts = counts or [counters.Counts(rounds=0, accepted=0)] * len(answers)
    of_rounds = [c.tau_tokens(n, 1) for c, n in zip(counts, tokens, strict=True)]
    return Tally(tokens, [answer.seconds for answer in answers], of_rounds, [c.rounds or 0 for c in counts])


def _summary(level: Level, plain: Session | None, kept: Sequence[int]) -> dict[str, Any]:
    """The headline of one draft, at its base level."""
    answers, counts = _one(level, kept)
    whole, mine = counters.total(counts), _tally(level, kept)
    unconditional, conditional = counters.acceptance(whole)
    tokens = sum(mine.tokens) - len(answers)
    summary: dict[str, Any] = {
        "tau_pooled": mine.tau(),
        "tau_source": counters.SOURCES[whole.prefix],
        "compared": len(answers),
        "acceptance_conditional": conditional,
        "acceptance_unconditional": unconditional,
        "tokens_per_second": mine.rate(),
        "rounds": whole.rounds,
        "drafted": whole.drafted,
        "tokens": tokens,
    }
    if level.by_prompt:
        summary["tau_after_cut"] = replace(mine, of_rounds=[n - 1 for n in mine.tokens]).tau()
        summary["tau_macro"] = mine.tau_macro()
    elif not level.failed:
        summary["tau_after_cut"] = replace(mine, of_rounds=[tokens]).tau()
    if plain:
        summary["speedup"] = mine.speedup(_tally(plain.base, kept))
    if plain and level.by_prompt:
        others, _ = _one(plain.base, kept)
        summary["identical_to_plain"] = sum(a.same_output(b) for a, b in zip(answers, others, strict=True))
    return summary


def _level(found: Session, plain: Session | None, concurrency: int, kept: Sequence[int]) -> dict[str, Any]:
    """One server at one concurrency, for ``server.levels``."""
    level = found.levels[concurrency]
    answers, counts = _one(level, kept)
    whole, mine = counters.total(counts), _tally(level, kept)
    firsts = [a.first for a in answers if a.first is not None]
    entry: dict[str, Any] = {
        "requests": len(level.answers),
        "failed": level.failed,
        "tokens": sum(mine.tokens),
        "seconds": sum(mine.seconds),
        "tokens_per_second": mine.rate(),
        "in_flight": round(level.in_flight, 2),
        "inter_token_ms": _spread([a.inter_token for a in answers]),
        "ttft_ms": _spread(firsts),
        "request_ms": _spread([a.seconds for a in answers]),
    }
    if firsts:
        median = {"value": statistics.median(firsts), "low": None, "high": None}
        entry["ttft"] = bootstrap(firsts, statistics.median).to_dict() if level.by_prompt else median
    if found.name != PLAIN:
        entry["tau"] = mine.tau()
        entry["acceptance_unconditional"], _ = counters.acceptance(whole)
        entry |= {"rounds": whole.rounds, "drafted": whole.drafted, "accepted": whole.accepted}
        if plain:
            entry["speedup"] = mine.speedup(_tally(plain.levels[concurrency], kept))
    if level.gauges:
        entry["gauges"] = {"what": "the server's own last reading, not a difference", **level.gauges}
    return entry


def _spread(seconds: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, median and 99th percentile in milliseconds; None where there is nothing."""
    known = [1000 * value for value in seconds if value is not None]
    if not known:
        return None
    p50, p99 = np.percentile(known, [50, 99])
    return {"mean": float(np.mean(known)), "p50": float(p50), "p99": float(p99)}


def _entry(found: Session, index: int) -> dict[str, Any]:
    """One answer of a server at concurrency 1."""
    answer = found.base.answers[index]
    entry: dict[str, Any] = {"tokens": answer.tokens, "seconds": round(answer.seconds, 4)}
    if answer.first is not None:
        entry["ttft"] = round(answer.first, 4)
    if found.name != PLAIN:
        counts = found.base.counts[index]
        entry |= {"rounds": counts.rounds, "accepted_tokens": counts.accepted}
    return entry
