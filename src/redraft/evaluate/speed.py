"""The paired benchmark: plain decoding and one or more drafts on the same prompts, in one run.

Every prompt is decoded by every contestant before the next prompt begins, in an order that rotates, so that a
machine that slows down slows all of them. Speed counts prefill and decoding together. Figures carry bootstrap 95%
intervals over prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redraft.decode import make_decoder
from redraft.decode.engine import Generation, PlainDecoder
from redraft.decode.pieces import trace
from redraft.decode.tree import ChainShape, Shape
from redraft.drafts.base import Proposer
from redraft.errors import UserError
from redraft.evaluate import summary
from redraft.evaluate.costs import costs
from redraft.evaluate.statistics import ratio_of_sums
from redraft.sampling import Sampler
from redraft.target import Target

SCHEMA = "redraft.bench/1"


@dataclass(frozen=True)
class Prompt:
    """A prompt as the target's chat template made it; the suite's task and reference answer where it has them."""

    id: str
    ids: list[int]
    task: str = ""
    reference: str | None = None


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how.

    ``greedy_drafts``: the draft proposes its likeliest tokens although the target samples. ``contest_prompts``: on how
    many prompts the data types compete for the plain baseline; ``alpha_prompts``: on how many alpha is measured, in an
    untimed pass of its own; ``traces``: of how many the whole decoding is kept, for the token view.
    """

    shape: Shape = field(default_factory=ChainShape)
    sampler: Sampler = field(default_factory=Sampler)
    greedy_drafts: bool = False
    max_new_tokens: int = 128
    seed: int = 0
    contest_prompts: int = 3
    alpha_prompts: int = 6
    traces: int = 4

    @property
    def depth(self) -> int:
        return self.shape.depth


Tick = Callable[[int, str], None]


@dataclass
class Measured:
    """A finished measurement: the result as plain JSON values, and the decoded prompts by contestant."""

    result: dict[str, Any]
    runs: dict[str, list[Generation]]
    target: Target


def bench(
    targets: Mapping[str, Target],
    drafts: Mapping[str, Proposer],
    prompts: Sequence[Prompt],
    config: BenchConfig,
    provenance: Mapping[str, Any],
    tick: Tick | None = None,
) -> Measured:
    """The result (schema ``redraft.bench/1``, docs/formats.md) with the generations that it comes from.

    ``targets`` holds the same model by data type (``float32``, ``bfloat16``); the faster one in plain decoding is
    the baseline and the target of all drafts. Raises ``UserError`` when there is nothing to measure.
    """
    if not prompts:
        raise UserError("no prompts to measure on; give at least one")
    contest = _contest(targets, prompts, config)
    fastest = max(contest, key=lambda name: _rate(contest[name]))
    target = targets[fastest]
    decoders: dict[str, PlainDecoder] = {"plain": PlainDecoder(target, config.sampler)}
    for name, draft in drafts.items():
        decoders[name] = make_decoder(target, draft, config.shape, config.sampler, config.greedy_drafts)
    for decoder in decoders.values():
        decoder.generate(prompts[0].ids, min(16, config.max_new_tokens), config.seed)  # warm-up
    began = time.perf_counter()
    runs = _measure(decoders, prompts, config, tick)
    wall, decoding = time.perf_counter() - began, sum(summary.seconds(g) for part in runs.values() for g in part)
    plain: dict[str, dict[str, Any]] = {fastest: {"tokens_per_second": summary.speed(runs["plain"])}}
    for name in contest.keys() - {fastest}:
        plain[name] = {"tokens_per_second": summary.speed(contest[name])}
        plain[name]["relative"] = summary.speedup(contest[name], contest[fastest])
    tasks = [prompt.task for prompt in prompts]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": dict(provenance),
        "setup": _setup(target, prompts, config, fastest, {n: len(found) for n, found in contest.items()})
        | {"overhead": wall / decoding - 1},
        "plain": {**plain, "fastest": fastest},
        "drafts": {},
        "gains": summary.gains(runs, list(drafts)),
        "per_prompt": summary.per_prompt(runs, [prompt.id for prompt in prompts], tasks),
        "traces": _traces(target, runs, prompts, config),
    }
    for name, draft in drafts.items():
        result["drafts"][name] = {
            "dtype": fastest,
            "parameters": sum(p.numel() for p in draft.parameters()),
            "alpha": _alpha(target, draft, prompts[: config.alpha_prompts], config),
            **summary.summarise(runs[name], runs["plain"], config.depth),
            **costs(target, draft, runs[name], runs["plain"]),
            "by_task": summary.by_task(runs[name], runs["plain"], tasks),
        }
    return Measured(result, runs, target)


def _setup(
    target: Target, prompts: Sequence[Prompt], config: BenchConfig, dtype: str, contest: Mapping[str, int]
) -> dict[str, Any]:
    chain = isinstance(config.shape, ChainShape)
    fixed = config.sampler.greedy or config.greedy_drafts
    return {
        "target": target.name,
        "sampler": config.sampler.describe(),
        "draft_tokens": "greedy" if fixed else "sampled",
        "gamma": config.depth,
        "shape": "chain" if chain else config.shape.describe(),
        "prompts": len(prompts),
        "max_new_tokens": config.max_new_tokens,
        "batch": 1,
        "seed": config.seed,
        "dtype": dtype,
        "speed": "tokens a second over prefill and decoding together",
        "contest_prompts": {name: len(prompts) if name == dtype else count for name, count in contest.items()},
    }


# -- measuring -------------------------------------------------------------------------------------------------------
def _rate(found: Sequence[Generation]) -> float:
    return sum(len(g.ids) for g in found) / sum(map(summary.seconds, found))


def _contest(
    targets: Mapping[str, Target], prompts: Sequence[Prompt], config: BenchConfig
) -> dict[str, list[Generation]]:
    """Plain decoding of a few prompts with every data type, in turns."""
    decoders = {name: PlainDecoder(target, config.sampler) for name, target in targets.items()}
    if len(decoders) == 1:
        prompts = prompts[:1]
    for decoder in decoders.values():
        decoder.generate(prompts[0].ids, min(8, config.max_new_tokens), config.seed)  # warm-up
    return _measure(decoders, prompts[: config.contest_prompts], config, None)


def _measure(
    decoders: Mapping[str, PlainDecoder], prompts: Sequence[Prompt], config: BenchConfig, tick: Tick | None
) -> dict[str, list[Generation]]:
    names = list(decoders)
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


def _alpha(target: Target, draft: Proposer, prompts: Sequence[Prompt], config: BenchConfig) -> dict[str, float] | None:
    """Mean of sum_x min(target, draft) along a chain of the shape's depth; at temperature 1 when decoding is greedy."""
    decoder = make_decoder(target, draft, ChainShape(config.depth), config.sampler, measure_overlap=True)
    limit = min(64, config.max_new_tokens)
    found = [
        [value for record in decoder.generate(p.ids, limit, config.seed).rounds for value in record.overlap]
        for p in prompts
    ]
    return ratio_of_sums([sum(a) for a in found], [len(a) for a in found]).to_dict() if any(found) else None


def _traces(
    target: Target, runs: Mapping[str, Sequence[Generation]], prompts: Sequence[Prompt], config: BenchConfig
) -> list[dict[str, Any]]:
    """The first prompts, decoded: who proposed each token. Nothing for a target without a tokenizer."""
    if target.tokenizer is None:
        return []
    return [
        {
            "id": prompt.id,
            "task": prompt.task or None,
            "prompt": target.tokenizer.decode(prompt.ids),
            "drafts": {n: trace(target.tokenizer, prompt.ids, r[i]) for n, r in runs.items() if n != "plain"},
        }
        for i, prompt in enumerate(prompts[: config.traces])
    ]


def tau_interval(accepted: Mapping[str, Sequence[int]], tokens: Mapping[str, int]) -> dict[str, float]:
    """tau_pooled with its interval from a simulation: accepted tokens of every round and tokens, by row key."""
    keys = [key for key in accepted if accepted[key]]
    return ratio_of_sums([tokens[k] for k in keys], [len(accepted[k]) for k in keys]).to_dict()
