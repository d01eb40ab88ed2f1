"""The figures of a server benchmark, from what the client saw and the servers counted.

At concurrency 1 there is an answer and a difference of the counters for every prompt, so figures carry bootstrap 95%
intervals over prompts, paired between servers. At higher concurrency only totals are known: the ends are null.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from redraft.errors import UserError
from redraft.evaluate.counters import ENGINES, SOURCES, Counts, acceptance, total
from redraft.evaluate.figures import PLAIN, Tally, by_task, gains
from redraft.evaluate.load import Answer, Level, ServerConfig
from redraft.evaluate.speed import SCHEMA, Prompt
from redraft.evaluate.statistics import bootstrap

FAULTS_LISTED = 20


@dataclass(frozen=True)
class Contestant:
    """One server's measurements, by concurrency, and what it said of itself."""

    name: str
    levels: dict[int, Level]
    engine: str
    version: str | None
    model: str
    notes: list[str]

    @property
    def base(self) -> Level:
        """The level that the headline is of: concurrency 1, or the lowest."""
        return self.levels[min(self.levels)]

    @property
    def product(self) -> str:
        """``vLLM 0.32.0``, as far as it is known."""
        return " ".join(filter(None, [ENGINES.get(self.engine, "unknown engine"), self.version]))


def server_result(
    measured: Mapping[str, Contestant],
    prompts: Sequence[Prompt],
    config: ServerConfig,
    target: str,
    provenance: Mapping[str, Any],
    one_by_one: bool,
) -> dict[str, Any]:
    """The whole result as plain JSON values; ``one_by_one`` when the servers ran after each other."""
    plain = measured.get(PLAIN)
    drafts = {name: found for name, found in measured.items() if name != PLAIN}
    kept = _kept(measured)
    tallies = {name: _tally(found.base, kept) for name, found in measured.items()}
    for found in drafts.values():
        if found.base.by_prompt and not tallies[found.name].with_rounds():
            raise UserError(
                f"{found.name} drafted for none of the prompts that every server answered; give longer ones"
            )
    widths = {len(total(found.base.counts).per_position) for found in drafts.values()}
    gamma = widths.pop() if len(widths) == 1 else 0
    batch = min(config.concurrencies)
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
            "concurrency": sorted(config.concurrencies),
            "order": _order(one_by_one, batch, len(measured)),
            "speed": "output tokens a second as the client sees it, from sending a request to the end of its answer",
        },
        "drafts": {name: _summary(found, plain, kept) for name, found in drafts.items()},
        "gains": gains({name: tallies[name] for name in drafts}) if batch == 1 else {},
        "per_prompt": _per_prompt(measured, prompts, kept) if batch == 1 else [],
        "server": {
            "levels": [
                {"concurrency": n, **{name: _level(c, plain, n, kept) for name, c in measured.items()}}
                for n in sorted(config.concurrencies)
            ],
            "served": {name: {"engine": c.product, "model": c.model} for name, c in measured.items()},
            "failures": _failures(measured, prompts),
            "notes": [note for found in measured.values() for note in found.notes],
        },
    }
    if plain:
        result["plain"] = {"server": {"tokens_per_second": tallies[PLAIN].rate()}, "fastest": "server"}
    if batch == 1:
        tasks = [prompts[i].task for i in kept]
        order = dict.fromkeys(filter(None, tasks))
        for name in drafts:
            result["drafts"][name]["by_task"] = by_task(tallies[name], tallies.get(PLAIN), tasks, order)
    return result


def _order(one_by_one: bool, batch: int, count: int) -> str:
    if one_by_one:
        return "one server after another; prompts are paired across their runs"
    if batch > 1 or count == 1:
        return "levels after each other"
    return "at concurrency 1 every prompt on every server, in rotation; other levels after each other"


def _kept(measured: Mapping[str, Contestant]) -> list[int]:
    """The prompts that every server answered at its base level: those that can be paired."""
    answers = [found.base.answers for found in measured.values()]
    return [i for i in range(len(answers[0])) if not any(each[i].fault for each in answers)]


def _one(level: Level, kept: Sequence[int]) -> tuple[list[Answer], list[Counts]]:
    """Answers and counts of the prompts that are compared: single ones at concurrency 1, else all."""
    if not level.by_prompt:
        return level.good, level.counts
    return [level.answers[i] for i in kept], [level.counts[i] for i in kept] if level.counts else []


def _tally(level: Level, kept: Sequence[int]) -> Tally:
    """An entry a prompt at concurrency 1, else one of totals. tau's tokens are the counters' where these have them."""
    answers, counts = _one(level, kept)
    tokens = [answer.tokens for answer in answers]
    if not level.by_prompt:
        whole = total(counts)
        numerator = whole.tau_tokens(sum(tokens), len(answers))
        return Tally([sum(tokens)], [level.wall], [numerator], [whole.rounds or 0], whole=True)
    seconds = [answer.seconds for answer in answers]
    if not counts:
        return Tally(tokens, seconds, [0] * len(tokens), [0] * len(tokens))
    of_rounds = [c.tau_tokens(n, 1) for c, n in zip(counts, tokens, strict=True)]
    return Tally(tokens, seconds, of_rounds, [c.rounds or 0 for c in counts])


def _summary(found: Contestant, plain: Contestant | None, kept: Sequence[int]) -> dict[str, Any]:
    """The headline of one draft, at its base level."""
    level = found.base
    answers, counts = _one(level, kept)
    whole, mine = total(counts), _tally(level, kept)
    unconditional, conditional = acceptance(whole)
    tokens = sum(mine.tokens) - len(answers)
    summary: dict[str, Any] = {
        "tau_pooled": mine.tau(),
        "tau_source": SOURCES[whole.prefix],
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


def _level(found: Contestant, plain: Contestant | None, concurrency: int, kept: Sequence[int]) -> dict[str, Any]:
    """One server at one concurrency, for ``server.levels``."""
    level = found.levels[concurrency]
    answers, counts = _one(level, kept)
    whole, mine = total(counts), _tally(level, kept)
    entry: dict[str, Any] = {
        "requests": len(level.answers),
        "failed": level.failed,
        "tokens": sum(mine.tokens),
        "seconds": sum(mine.seconds),
        "tokens_per_second": mine.rate(),
        "in_flight": round(level.in_flight, 2),
        "inter_token_ms": _spread([a.inter_token for a in answers]),
        "ttft_ms": _spread([a.first for a in answers]),
        "request_ms": _spread([a.seconds for a in answers]),
    }
    firsts = [a.first for a in answers if a.first is not None]
    if firsts:
        median = {"value": statistics.median(firsts), "low": None, "high": None}
        entry["ttft"] = bootstrap(firsts, statistics.median).to_dict() if level.by_prompt else median
    if found.name != PLAIN:
        entry["tau"] = mine.tau()
        entry["acceptance_unconditional"], _ = acceptance(whole)
        entry |= {"rounds": whole.rounds, "drafted": whole.drafted, "accepted": whole.accepted}
    if found.name != PLAIN and plain:
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


def _per_prompt(
    measured: Mapping[str, Contestant], prompts: Sequence[Prompt], kept: Sequence[int]
) -> list[dict[str, Any]]:
    def entry(level: Level, index: int) -> dict[str, Any]:
        answer = level.answers[index]
        found: dict[str, Any] = {"tokens": answer.tokens, "seconds": round(answer.seconds, 4)}
        if answer.first is not None:
            found["ttft"] = round(answer.first, 4)
        return found

    def speculated(level: Level, index: int) -> dict[str, Any]:
        counts = level.counts[index]
        return entry(level, index) | {"rounds": counts.rounds, "accepted_tokens": counts.accepted}

    found = []
    for index in kept:
        line: dict[str, Any] = {"id": prompts[index].id}
        if prompts[index].task:
            line["task"] = prompts[index].task
        if PLAIN in measured:
            line["plain"] = entry(measured[PLAIN].base, index)
        line["drafts"] = {name: speculated(c.base, index) for name, c in measured.items() if name != PLAIN}
        found.append(line)
    return found


def _failures(measured: Mapping[str, Contestant], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    found = [
        {"server": name, "concurrency": n, "id": prompt.id, "reason": answer.fault}
        for name, contestant in measured.items()
        for n, level in contestant.levels.items()
        for prompt, answer in zip(prompts, level.answers, strict=True)
        if answer.fault
    ]
    return found[:FAULTS_LISTED]
