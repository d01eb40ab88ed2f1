"""The figures of a server benchmark, from what the client saw and the servers counted.

At concurrency 1 there is an answer and a difference of the counters for every prompt, so figures carry bootstrap 95%
intervals over prompts, paired between servers. At higher concurrency only totals are known: the ends are null.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redraft.errors import UserError
from redraft.evaluate.counters import ENGINES, SOURCES, Counts, acceptance, total
from redraft.evaluate.load import Answer, Level, ServerConfig
from redraft.evaluate.speed import SCHEMA, Prompt
from redraft.evaluate.statistics import bootstrap, mean, paired_difference, paired_ratio, ratio_of_sums
from redraft.evaluate.summary import PLAIN

FAULTS_LISTED = 20

Pairs = tuple[list[float], list[float]]


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
    for found in drafts.values():
        if found.base.by_prompt and not _with_rounds(found.base, kept):
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
        "gains": _gains(drafts, kept) if batch == 1 else {},
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
        rate = _rate(plain.base, kept)
        result["plain"] = {"server": {"tokens_per_second": rate}, "fastest": "server"}
    if batch == 1:
        for name, found in drafts.items():
            result["drafts"][name]["by_task"] = _by_task(found, plain, prompts, kept)
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


def _point(value: float) -> dict[str, float | None]:
    """A figure of which only the total is known."""
    return {"value": value, "low": None, "high": None}


def _speed_pairs(level: Level, kept: Sequence[int]) -> Pairs:
    """(tokens, seconds): a pair a prompt at concurrency 1, else one pair of totals."""
    answers, _ = _one(level, kept)
    if level.by_prompt:
        return [a.tokens for a in answers], [a.seconds for a in answers]
    return [sum(a.tokens for a in answers)], [level.wall]


def _tau_pairs(level: Level, kept: Sequence[int]) -> Pairs:
    """(numerators, rounds) of tau: a pair a prompt that had rounds at concurrency 1, else one pair of totals."""
    answers, counts = _one(level, kept)
    if not level.by_prompt:
        whole = total(counts)
        tokens = sum(a.tokens for a in answers)
        return [whole.tau_tokens(tokens, len(answers))], [whole.rounds or 0]
    pairs = [(c.tau_tokens(a.tokens, 1), c.rounds) for a, c in zip(answers, counts, strict=True) if c.rounds]
    return [float(n) for n, _ in pairs], [float(d) for _, d in pairs]


def _with_rounds(level: Level, kept: Sequence[int]) -> list[int]:
    """Those of the prompts that had rounds: an answer of one token comes from prefill alone."""
    return [i for i in kept if level.counts[i].rounds]


def _ratio(level: Level, pairs: Pairs) -> dict[str, float | None]:
    if level.by_prompt:
        return dict(ratio_of_sums(*pairs).to_dict())
    return _point(pairs[0][0] / pairs[1][0])


def _rate(level: Level, kept: Sequence[int]) -> dict[str, float | None]:
    return _ratio(level, _speed_pairs(level, kept))


def _speedup(level: Level, plain: Level, kept: Sequence[int]) -> dict[str, float | None]:
    mine, base = _speed_pairs(level, kept), _speed_pairs(plain, kept)
    if level.by_prompt:
        return dict(paired_ratio(mine, base).to_dict())
    return _point(mine[0][0] / mine[1][0] / (base[0][0] / base[1][0]))


def _summary(found: Contestant, plain: Contestant | None, kept: Sequence[int]) -> dict[str, Any]:
    """The headline of one draft, at its base level."""
    level = found.base
    answers, counts = _one(level, kept)
    whole, tau = total(counts), _tau_pairs(level, kept)
    unconditional, conditional = acceptance(whole)
    tokens = sum(a.tokens for a in answers) - len(answers)
    summary: dict[str, Any] = {
        "tau_pooled": _ratio(level, tau),
        "tau_source": SOURCES[whole.prefix],
        "compared": len(answers),
        "acceptance_conditional": conditional,
        "acceptance_unconditional": unconditional,
        "tokens_per_second": _rate(level, kept),
        "rounds": whole.rounds,
        "drafted": whole.drafted,
        "tokens": tokens,
    }
    if not level.by_prompt and len(answers) == len(level.answers):
        summary["tau_after_cut"] = _point(tokens / (whole.rounds or 1))
    if level.by_prompt:
        pairs = [(a.tokens - 1, c.rounds) for a, c in zip(answers, counts, strict=True) if c.rounds]
        summary["tau_after_cut"] = ratio_of_sums([n for n, _ in pairs], [d for _, d in pairs]).to_dict()
        summary["tau_macro"] = mean([n / d for n, d in zip(*tau, strict=True)]).to_dict()
    if plain:
        summary["speedup"] = _speedup(level, plain.base, kept)
    if plain and level.by_prompt:
        others, _ = _one(plain.base, kept)
        summary["identical_to_plain"] = sum(a.same_output(b) for a, b in zip(answers, others, strict=True))
    return summary


def _by_task(
    found: Contestant, plain: Contestant | None, prompts: Sequence[Prompt], kept: Sequence[int]
) -> dict[str, Any]:
    """The headline of one draft for the prompts of each task; a task whose prompts had no rounds is left out."""
    figures = {}
    for task in dict.fromkeys(prompts[i].task for i in kept if prompts[i].task):
        part = [i for i in kept if prompts[i].task == task]
        if not _with_rounds(found.base, part):
            continue
        figures[task] = {
            "prompts": len(part),
            "tau_pooled": _ratio(found.base, _tau_pairs(found.base, part)),
            "tokens_per_second": _rate(found.base, part),
        }
        if plain:
            figures[task]["speedup"] = _speedup(found.base, plain.base, part)
            figures[task]["plain_tokens_per_second"] = _rate(plain.base, part)
    return figures


def _gains(drafts: Mapping[str, Contestant], kept: Sequence[int]) -> dict[str, Any]:
    """Every later draft against the first, paired over the same prompts."""
    names = list(drafts)
    gains = {}
    for name in names[1:]:
        new, old = drafts[name].base, drafts[names[0]].base
        both = _with_rounds(new, _with_rounds(old, kept))
        gains[f"{name} over {names[0]}"] = {
            "tau": paired_difference(_tau_pairs(new, both), _tau_pairs(old, both)).to_dict(),
            "speed": _speedup(new, old, kept),
        }
    return gains


def _level(found: Contestant, plain: Contestant | None, concurrency: int, kept: Sequence[int]) -> dict[str, Any]:
    """One server at one concurrency, for ``server.levels``."""
    level = found.levels[concurrency]
    if level is not found.base:
        kept = [i for i, answer in enumerate(level.answers) if not answer.fault]
    answers, counts = _one(level, kept)
    whole = total(counts)
    entry: dict[str, Any] = {
        "requests": len(level.answers),
        "failed": level.failed,
        "tokens": sum(a.tokens for a in answers),
        "seconds": sum(a.seconds for a in answers) if level.by_prompt else level.wall,
        "tokens_per_second": _rate(level, kept),
        "in_flight": round(level.in_flight, 2),
        "inter_token_ms": _spread([a.inter_token for a in answers]),
        "ttft_ms": _spread([a.first for a in answers]),
        "request_ms": _spread([a.seconds for a in answers]),
    }
    firsts = [a.first for a in answers if a.first is not None]
    if firsts:
        median = bootstrap(firsts, statistics.median).to_dict() if level.by_prompt else None
        entry["ttft"] = median or _point(statistics.median(firsts))
    if found.name != PLAIN:
        entry["tau"] = _ratio(level, _tau_pairs(level, kept))
        entry["acceptance_unconditional"], _ = acceptance(whole)
        entry |= {"rounds": whole.rounds, "drafted": whole.drafted, "accepted": whole.accepted}
    if found.name != PLAIN and plain:
        entry["speedup"] = _speedup(level, plain.levels[concurrency], kept)
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
