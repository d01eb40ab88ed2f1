"""The paired benchmark: plain decoding and one or more drafts on the same prompts, in one run.

Every prompt is decoded by every contestant before the next prompt begins, in an order that rotates, so that a
machine that slows down slows all of them. Speed counts prefill and decoding together. Figures carry bootstrap 95%
intervals over prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redraft.decode.auto import make_decoder
from redraft.decode.engine import PlainDecoder
from redraft.decode.requests import Generation, trace
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.evaluate.divergence import plain_text
from redraft.evaluate.figures import PLAIN, by_task, costs, gains, per_prompt, seconds, summarise, tally
from redraft.evaluate.statistics import ratio_of_sums
from redraft.rows import TokenRow, anchors
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, Shape
from redraft.target import Target

SCHEMA = "redraft.bench/1"
# A data type that took so many times as long as the fastest on one prompt, on two, is beaten; what is closer is
# measured on more. One prompt alone may have met with other work on the machine.
BEATEN = (2.0, 1.25)

Key = TypeVar("Key")


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
    many prompts, at most, the data types compete; ``alpha_prompts``: on how many alpha is measured, in an
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


Tick = Callable[[int, str], None]
Count = Callable[[Generation, str], None]


@dataclass
class Measured:
    """A finished measurement: the result as plain JSON values, and by contestant the decoded prompts and the target.

    ``expected`` are, by draft, the texts of plain decoding in the draft's data type.
    """

    result: dict[str, Any]
    runs: dict[str, list[Generation]]
    targets: dict[str, Target]
    expected: dict[str, list[list[int]]]


def bench(
    targets: Mapping[str, Target],
    drafts: Mapping[str, Draft],
    prompts: Sequence[Prompt],
    config: BenchConfig,
    provenance: Mapping[str, Any],
    tick: Tick | None = None,
) -> Measured:
    """The result (schema ``redraft.bench/1``, docs/formats.md) with the generations that it comes from.

    ``targets`` holds the same model by data type (``float32``, ``bfloat16``). Plain decoding and every draft run in
    the type that a short contest shows to be their fastest: one row a pass and several may want different ones.
    Speed-ups are over the fastest plain decoding. Raises ``UserError`` when there is nothing to measure.
    """
    if not prompts:
        raise UserError("no prompts to measure on; give at least one")
    tokens = 0

    def count(run: Generation, what: str) -> None:
        nonlocal tokens
        tokens += len(run.ids)
        if tick:
            tick(tokens, what)

    held = contest(targets, drafts, prompts, config, count) if len(targets) > 1 else {}
    chosen = {
        n: max(held[n], key=lambda t: _rate(held[n][t])) if held else next(iter(targets)) for n in [PLAIN, *drafts]
    }
    used = {name: targets[dtype] for name, dtype in chosen.items()}
    decoders = {name: _decoder(target, drafts.get(name), config) for name, target in used.items()}
    for decoder in decoders.values():
        decoder.generate(prompts[0].ids, min(16, config.max_new_tokens), config.seed)  # warm-up
    runs: dict[str, list[Generation]] = {name: [] for name in decoders}
    began = time.perf_counter()
    for index, prompt in enumerate(prompts):
        for name, run in _turn(decoders, prompt, index, config):
            runs[name].append(run)
            count(run, f"prompt {index + 1} of {len(prompts)}, {name}")
    wall, decoding = time.perf_counter() - began, sum(seconds(g) for part in runs.values() for g in part)
    expected = {name: [run.ids for run in runs[PLAIN]] for name in drafts}
    for name in drafts:
        if chosen[name] != chosen[PLAIN] and config.sampler.greedy:  # a pass tells plain decoding's text in this type
            asked = zip(prompts, runs[name], strict=True)
            expected[name] = [plain_text(prompt.ids, run.ids, used[name]) for prompt, run in asked]
    tasks = [prompt.task for prompt in prompts]
    tallies = {name: tally(found) for name, found in runs.items()}
    own, in_contest = chosen[PLAIN], held.get(PLAIN, {})
    timed = {dtype: len(some) for dtype, some in in_contest.items()} | {own: len(prompts)}
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": dict(provenance),
        "setup": {"target": used[PLAIN].name, **_setup(config), "prompts": len(prompts), "dtype": own}
        | {"contest_prompts": timed, "overhead": wall / decoding - 1},
        "plain": _plain(runs[PLAIN], own, in_contest),
        "contest": {
            name: {dtype: {"prompts": len(some), "tokens_per_second": _rate(some)} for dtype, some in by_type.items()}
            for name, by_type in held.items()
        },
        "drafts": {},
        "gains": gains({name: tallies[name] for name in drafts}),
        "per_prompt": per_prompt(
            runs, {i: (p.id, p.task) for i, p in enumerate(prompts)}, lambda name, i: _entry(name, runs[name][i])
        ),
        "traces": _traces(used[PLAIN], runs, prompts, config),
    }
    for name, draft in drafts.items():
        result["drafts"][name] = {
            "dtype": chosen[name],
            "parameters": sum(p.numel() for p in draft.parameters()),
            "alpha": _alpha(used[name], draft, prompts[: config.alpha_prompts], config),
            **summarise(runs[name], tallies[PLAIN], config.shape.depth, expected[name]),
            **costs(used[name], draft, runs[name], runs[PLAIN]),
            "by_task": by_task(tallies[name], tallies[PLAIN], tasks, sorted({*tasks} - {""})),
        }
    return Measured(result, runs, used, expected)


def _setup(config: BenchConfig) -> dict[str, Any]:
    return {
        "sampler": config.sampler.describe(),
        "draft_tokens": "greedy" if config.sampler.greedy or config.greedy_drafts else "sampled",
        "gamma": config.shape.depth,
        "shape": "chain" if isinstance(config.shape, ChainShape) else config.shape.describe(),
        "max_new_tokens": config.max_new_tokens,
        "batch": 1,
        "seed": config.seed,
        "speed": "tokens a second over prefill and decoding together",
    }


def _plain(runs: Sequence[Generation], fastest: str, held: Mapping[str, Sequence[Generation]]) -> dict[str, Any]:
    """Plain decoding by data type: the fastest on all prompts, the others on those of the contest, and over it."""
    found: dict[str, Any] = {fastest: {"tokens_per_second": tally(runs).rate()}}
    for name in held.keys() - {fastest}:
        both = min(len(held[name]), len(held[fastest]))
        relative = tally(held[name][:both]).speedup(tally(held[fastest][:both]))
        found[name] = {"tokens_per_second": tally(held[name]).rate(), "relative": relative}
    return {**found, "fastest": fastest}


def _entry(name: str, run: Generation) -> dict[str, Any]:
    """One answer of a contestant."""
    entry: dict[str, Any] = {"tokens": len(run.ids), "seconds": round(seconds(run), 4)}
    return (
        entry
        if name == PLAIN
        else entry
        | {
            "rounds": len(run.rounds),
            "accepted": [record.accepted for record in run.rounds],
        }
    )


# -- measuring -------------------------------------------------------------------------------------------------------
def _rate(found: Sequence[Generation]) -> float:
    return sum(len(g.ids) for g in found) / sum(map(seconds, found))


def _decoder(target: Target, draft: Draft | None, config: BenchConfig) -> PlainDecoder:
    if draft is None:
        return PlainDecoder(target, config.sampler)
    return make_decoder(target, draft, config.shape, config.sampler, config.greedy_drafts)


def _turn(
    decoders: Mapping[Key, PlainDecoder], prompt: Prompt, index: int, config: BenchConfig
) -> Iterator[tuple[Key, Generation]]:
    """One prompt by every decoder; who begins rotates with the prompt's number."""
    names = list(decoders)
    turn = index % len(names)
    for name in names[turn:] + names[:turn]:
        yield name, decoders[name].generate(prompt.ids, config.max_new_tokens, config.seed + index)


def contest(
    targets: Mapping[str, Target],
    drafts: Mapping[str, Draft],
    prompts: Sequence[Prompt],
    config: BenchConfig,
    count: Count,
) -> dict[str, dict[str, list[Generation]]]:
    """A few prompts by every contestant in every data type, in turns: {contestant: {type: its generations}}.

    A type that is clearly beaten is left out of the prompts that follow, and where one alone is left, all are.
    """
    open_keys = {
        (name, dtype): _decoder(target, drafts.get(name), config)
        for name in [PLAIN, *drafts]
        for dtype, target in targets.items()
    }
    found: dict[str, dict[str, list[Generation]]] = {name: {t: [] for t in targets} for name in [PLAIN, *drafts]}
    for decoder in open_keys.values():
        decoder.generate(prompts[0].ids, min(8, config.max_new_tokens), config.seed)  # warm-up
    for index, prompt in enumerate(prompts[: config.contest_prompts]):
        for (name, dtype), run in _turn(open_keys, prompt, index, config):
            found[name][dtype].append(run)
            count(run, f"which type is faster: {name} in {dtype}")
        for name, by_type in found.items():
            rates = {dtype: _rate(runs) for dtype, runs in by_type.items() if (name, dtype) in open_keys}
            limit = BEATEN[min(index, len(BEATEN) - 1)]
            left = [dtype for dtype, rate in rates.items() if rate * limit > max(rates.values())]
            for dtype in rates:
                if dtype not in left or len(left) == 1:
                    del open_keys[name, dtype]
        if not open_keys:
            break
    return found


def _alpha(target: Target, draft: Draft, prompts: Sequence[Prompt], config: BenchConfig) -> dict[str, float] | None:
    """Mean of sum_x min(target, draft) along a chain of the shape's depth; at temperature 1 when decoding is greedy."""
    decoder = make_decoder(target, draft, ChainShape(config.shape.depth), config.sampler, measure_overlap=True)
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
            "drafts": {n: trace(target.tokenizer, prompt.ids, r[i]) for n, r in runs.items() if n != PLAIN},
        }
        for i, prompt in enumerate(prompts[: config.traces])
    ]


def tau_interval(accepted: Mapping[str, Sequence[int]], rows: Iterable[TokenRow]) -> dict[str, float]:
    """tau_pooled with its interval from a simulation: accepted tokens of every round, by row key."""
    tokens = {row.key: anchors(row) for row in rows}
    keys = [key for key in accepted if accepted[key]]
    return ratio_of_sums([tokens[k] for k in keys], [len(accepted[k]) for k in keys]).to_dict()
