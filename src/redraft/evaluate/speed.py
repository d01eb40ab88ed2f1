"""The paired benchmark: plain decoding and one or more drafts on the same prompts, in one run.

Every prompt is decoded by every contestant before the next prompt begins, in an order that rotates, so that a
machine that slows down slows all of them. Speed counts prefill and decoding together. Figures carry bootstrap 95%
intervals over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redraft import metrics
from redraft.decode.engine import ChainDecoder, Generation, PlainDecoder
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.errors import UserError
from redraft.evaluate.statistics import mean, paired_difference, paired_ratio, ratio_of_sums
from redraft.sampling import Sampler
from redraft.target import Target

SCHEMA = "redraft.bench/1"


@dataclass(frozen=True)
class Prompt:
    """A prompt as the target's chat template made it; ``task`` and ``reference`` where it comes from a suite."""

    id: str
    ids: list[int]
    task: str = ""
    reference: str | None = None


@dataclass(frozen=True)
class BenchConfig:
    """``contest_prompts``: on how many prompts the data types compete for the plain baseline; ``alpha_prompts``: on
    how many alpha is measured, in an untimed pass of its own."""

    gamma: int = 5
    sampler: Sampler = field(default_factory=Sampler)
    max_new_tokens: int = 128
    seed: int = 0
    contest_prompts: int = 3
    alpha_prompts: int = 6


Tick = Callable[[int, str], None]


def bench(
    targets: Mapping[str, Target],
    drafts: Mapping[str, Eagle3Draft],
    prompts: Sequence[Prompt],
    config: BenchConfig,
    provenance: Mapping[str, Any],
    tick: Tick | None = None,
) -> dict[str, Any]:
    """The result as plain JSON values (schema ``redraft.bench/1``, docs/formats.md).

    ``targets`` holds the same model by data type (``float32``, ``bfloat16``); the faster one in plain decoding is
    the baseline and the target of all drafts. Raises ``UserError`` when there is nothing to measure.
    """
    if not prompts:
        raise UserError("no prompts to measure on; give at least one")
    contest = {name: _contest(target, prompts, config) for name, target in targets.items()}
    fastest = max(contest, key=lambda name: _rate(contest[name]))
    target = targets[fastest]
    decoders: dict[str, PlainDecoder] = {"plain": PlainDecoder(target, config.sampler)}
    decoders |= {name: ChainDecoder(target, draft, config.gamma, config.sampler) for name, draft in drafts.items()}
    runs = _measure(decoders, prompts, config, tick)
    plain = {name: {"tokens_per_second": _speed(found)} for name, found in contest.items()}
    plain[fastest] = {"tokens_per_second": _speed(runs["plain"])}
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": dict(provenance),
        "setup": {
            "target": target.name,
            "sampler": config.sampler.describe(),
            "draft_tokens": "greedy" if config.sampler.greedy else "sampled",
            "gamma": config.gamma,
            "shape": "chain",
            "prompts": len(prompts),
            "max_new_tokens": config.max_new_tokens,
            "batch": 1,
            "seed": config.seed,
            "dtype": fastest,
            "speed": "tokens a second over prefill and decoding together",
            "contest_prompts": {n: len(prompts) if n == fastest else len(found) for n, found in contest.items()},
        },
        "plain": {**plain, "fastest": fastest},
        "drafts": {},
        "gains": {},
        "per_prompt": _per_prompt(runs, prompts),
    }
    for name, draft in drafts.items():
        alphas = _alphas(target, draft, prompts[: config.alpha_prompts], config)
        result["drafts"][name] = _summary(runs[name], runs["plain"], alphas, draft, config) | {"dtype": fastest}
    result["gains"] = _gains(runs, list(drafts))
    return result


# -- measuring -------------------------------------------------------------------------------------------------------
def _seconds(generation: Generation) -> float:
    return generation.prefill_seconds + generation.decode_seconds


def _rate(found: Sequence[Generation]) -> float:
    return sum(len(g.ids) for g in found) / sum(map(_seconds, found))


def _contest(target: Target, prompts: Sequence[Prompt], config: BenchConfig) -> list[Generation]:
    decoder = PlainDecoder(target, config.sampler)
    decoder.generate(prompts[0].ids, min(8, config.max_new_tokens), config.seed)  # warm-up
    return [decoder.generate(p.ids, config.max_new_tokens, config.seed) for p in prompts[: config.contest_prompts]]


def _measure(
    decoders: Mapping[str, PlainDecoder], prompts: Sequence[Prompt], config: BenchConfig, tick: Tick | None
) -> dict[str, list[Generation]]:
    names = list(decoders)
    for name in names:
        decoders[name].generate(prompts[0].ids, min(16, config.max_new_tokens), config.seed)  # warm-up
    runs: dict[str, list[Generation]] = {name: [] for name in names}
    tokens = 0
    for index, prompt in enumerate(prompts):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            found = decoders[name].generate(prompt.ids, config.max_new_tokens, config.seed + index)
            runs[name].append(found)
            tokens += len(found.ids)
            if tick:
                tick(tokens, f"prompt {index + 1} of {len(prompts)}, {name}")
    return runs


def _alphas(target: Target, draft: Eagle3Draft, prompts: Sequence[Prompt], config: BenchConfig) -> list[list[float]]:
    """sum_x min(target, draft) of every drafted position, a list a prompt; at temperature 1 when decoding is greedy."""
    decoder = ChainDecoder(target, draft, config.gamma, config.sampler, measure_overlap=True)
    limit = min(64, config.max_new_tokens)
    return [
        [value for record in decoder.generate(p.ids, limit, config.seed).rounds for value in record.overlap]
        for p in prompts
    ]


# -- figures ---------------------------------------------------------------------------------------------------------
def _accepted(runs: Sequence[Generation]) -> list[list[int]]:
    return [[record.accepted for record in run.rounds] for run in runs]


def _tokens(runs: Sequence[Generation]) -> list[int]:
    """Tokens that the rounds produced: the first one, which prefill gives, counts nowhere."""
    return [len(run.ids) - 1 for run in runs]


def _speed(runs: Sequence[Generation]) -> dict[str, float]:
    return ratio_of_sums([len(r.ids) for r in runs], [_seconds(r) for r in runs]).to_dict()


def _summary(
    runs: Sequence[Generation],
    plain: Sequence[Generation],
    alphas: Sequence[Sequence[float]],
    draft: Eagle3Draft,
    config: BenchConfig,
) -> dict[str, Any]:
    accepted, tokens = _accepted(runs), _tokens(runs)
    drafted = [[len(record.proposed) for record in run.rounds] for run in runs]
    rounds = [len(run.rounds) for run in runs]
    kept = [i for i, count in enumerate(rounds) if count]
    draft_s = sum(record.draft_seconds for run in runs for record in run.rounds)
    verify_s = sum(record.verify_seconds for run in runs for record in run.rounds)
    sums, counts = [sum(a) for a in alphas], [len(a) for a in alphas]
    return {
        "parameters": sum(p.numel() for p in draft.parameters()),
        "tau_pooled": ratio_of_sums([tokens[i] for i in kept], [rounds[i] for i in kept]).to_dict(),
        "tau_macro": mean([tokens[i] / rounds[i] for i in kept]).to_dict(),
        "alpha": ratio_of_sums(sums, counts).to_dict() if sum(counts) else None,
        "acceptance_conditional": _plain_numbers(metrics.acceptance_conditional(accepted, drafted, config.gamma)),
        "acceptance_unconditional": _plain_numbers(metrics.acceptance_unconditional(accepted, drafted, config.gamma)),
        "tokens_per_second": _speed(runs),
        "speedup": paired_ratio(
            ([len(r.ids) for r in runs], [_seconds(r) for r in runs]),
            ([len(r.ids) for r in plain], [_seconds(r) for r in plain]),
        ).to_dict(),
        "time": {
            "draft": draft_s,
            "verify": verify_s,
            "prefill": sum(r.prefill_seconds for r in runs),
            "other": sum(r.decode_seconds for r in runs) - draft_s - verify_s,
        },
        "rounds": sum(rounds),
        "tokens": sum(tokens),
        "identical_to_plain": sum(a.ids == b.ids for a, b in zip(runs, plain, strict=True)),
    }


def _plain_numbers(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(v) else float(v) for v in values]


def _gains(runs: Mapping[str, Sequence[Generation]], names: Sequence[str]) -> dict[str, Any]:
    """Every later draft against the first, paired over the same prompts."""
    gains: dict[str, Any] = {}
    for name in names[1:]:
        new, old = runs[name], runs[names[0]]
        pairs = [(_tokens(r), [len(run.rounds) for run in r]) for r in (new, old)]
        speeds = [([len(g.ids) for g in r], [_seconds(g) for g in r]) for r in (new, old)]
        gains[f"{name} over {names[0]}"] = {
            "tau": paired_difference(pairs[0], pairs[1]).to_dict(),
            "speed": paired_ratio(speeds[0], speeds[1]).to_dict(),
        }
    return gains


def _per_prompt(runs: Mapping[str, Sequence[Generation]], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    def entry(run: Generation) -> dict[str, Any]:
        return {
            "tokens": len(run.ids),
            "rounds": len(run.rounds),
            "seconds": round(_seconds(run), 4),
            "accepted": [record.accepted for record in run.rounds],
        }

    return [
        {
            "id": prompt.id,
            "plain": {"tokens": len(runs["plain"][i].ids), "seconds": round(_seconds(runs["plain"][i]), 4)},
            "drafts": {name: entry(found[i]) for name, found in runs.items() if name != "plain"},
        }
        for i, prompt in enumerate(prompts)
    ]


def tau_interval(accepted: Mapping[str, Sequence[int]], tokens: Mapping[str, int]) -> dict[str, float]:
    """tau_pooled with its interval from a simulation: accepted tokens of every round and tokens, by row key."""
    keys = [key for key in accepted if accepted[key]]
    return ratio_of_sums([tokens[k] for k in keys], [len(accepted[k]) for k in keys]).to_dict()
