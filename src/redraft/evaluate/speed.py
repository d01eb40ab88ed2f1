"""The paired benchmark: plain decoding and one or more drafts on the same prompts, in one run.

Every prompt is decoded by every contestant before the next prompt begins, in an order that rotates, so that a
machine that slows down slows all of them. Speed counts prefill and decoding together. Figures carry bootstrap 95%
intervals over prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redraft.decode.auto import make_decoder
from redraft.decode.engine import PlainDecoder
from redraft.decode.requests import Generation, trace
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.evaluate import summary
from redraft.evaluate.divergence import plain_text
from redraft.evaluate.figures import PLAIN, by_task, gains
from redraft.evaluate.statistics import ratio_of_sums
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

    @property
    def depth(self) -> int:
        return self.shape.depth


Tick = Callable[[int, str], None]


@dataclass
class Measured:
    """A finished measurement: the result as plain JSON values, and by contestant the decoded prompts and the target.

    ``expected`` are, by draft, the texts of plain decoding in the draft's data type.
    """

    result: dict[str, Any]
    runs: dict[str, list[Generation]]
    targets: dict[str, Target]
    expected: dict[str, list[list[int]]]

    @property
    def target(self) -> Target:
        """The target of the fastest plain decoding."""
        return self.targets[PLAIN]


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
    counter = _Counter(tick)
    held = contest(targets, drafts, prompts, config, counter) if len(targets) > 1 else {}
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
            counter.add(run, f"prompt {index + 1} of {len(prompts)}, {name}")
    wall, decoding = time.perf_counter() - began, sum(summary.seconds(g) for part in runs.values() for g in part)
    expected = {name: _expected(name, chosen, runs, used[name], prompts, config) for name in drafts}
    tasks = [prompt.task for prompt in prompts]
    tallies = {name: summary.tally(found) for name, found in runs.items()}
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": dict(provenance),
        "setup": _setup(used[PLAIN], prompts, config, chosen[PLAIN], held.get(PLAIN, {chosen[PLAIN]: []}))
        | {"overhead": wall / decoding - 1},
        "plain": _plain(runs[PLAIN], chosen[PLAIN], held.get(PLAIN, {})),
        "contest": {name: {dtype: _entry(found) for dtype, found in by.items()} for name, by in held.items()},
        "drafts": {},
        "gains": gains({name: tallies[name] for name in drafts}),
        "per_prompt": summary.per_prompt(runs, [prompt.id for prompt in prompts], tasks),
        "traces": _traces(used[PLAIN], runs, prompts, config),
    }
    for name, draft in drafts.items():
        result["drafts"][name] = {
            "dtype": chosen[name],
            "parameters": sum(p.numel() for p in draft.parameters()),
            "alpha": _alpha(used[name], draft, prompts[: config.alpha_prompts], config),
            **summary.summarise(runs[name], runs[PLAIN], config.depth, expected[name]),
            **summary.costs(used[name], draft, runs[name], runs[PLAIN]),
            "by_task": by_task(tallies[name], tallies[PLAIN], tasks, sorted({*tasks} - {""})),
        }
    return Measured(result, runs, used, expected)


def _setup(
    target: Target, prompts: Sequence[Prompt], config: BenchConfig, dtype: str, held: Mapping[str, Sequence[Generation]]
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
        "contest_prompts": {name: len(prompts) if name == dtype else len(found) for name, found in held.items()},
    }


def _plain(runs: Sequence[Generation], fastest: str, held: Mapping[str, Sequence[Generation]]) -> dict[str, Any]:
    """Plain decoding by data type: the fastest on all prompts, the others on those of the contest, and over it."""
    found: dict[str, Any] = {fastest: {"tokens_per_second": summary.tally(runs).rate()}}
    for name in held.keys() - {fastest}:
        both = min(len(held[name]), len(held[fastest]))
        relative = summary.tally(held[name][:both]).speedup(summary.tally(held[fastest][:both]))
        found[name] = {"tokens_per_second": summary.tally(held[name]).rate(), "relative": relative}
    return {**found, "fastest": fastest}


def _entry(found: Sequence[Generation]) -> dict[str, Any]:
    return {"prompts": len(found), "tokens_per_second": _rate(found)}


def _expected(
    name: str,
    chosen: Mapping[str, str],
    runs: Mapping[str, Sequence[Generation]],
    target: Target,
    prompts: Sequence[Prompt],
    config: BenchConfig,
) -> list[list[int]]:
    """The texts that a draft's must equal: plain decoding's, which greedily in another type is told by a pass."""
    if chosen[name] == chosen[PLAIN] or not config.sampler.greedy:
        return [run.ids for run in runs[PLAIN]]
    return [plain_text(prompt.ids, run.ids, target) for prompt, run in zip(prompts, runs[name], strict=True)]


# -- measuring -------------------------------------------------------------------------------------------------------
class _Counter:
    """Tokens of everything that is decoded, for a line of progress."""

    def __init__(self, tick: Tick | None) -> None:
        self.tick, self.tokens = tick, 0

    def add(self, run: Generation, what: str) -> None:
        self.tokens += len(run.ids)
        if self.tick:
            self.tick(self.tokens, what)


def _rate(found: Sequence[Generation]) -> float:
    return sum(len(g.ids) for g in found) / sum(map(summary.seconds, found))


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
    counter: _Counter,
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
            counter.add(run, f"which type is faster: {name} in {dtype}")
        for name, by_type in found.items():
            running = [dtype for dtype in by_type if (name, dtype) in open_keys]
            rates = {dtype: _rate(by_type[dtype]) for dtype in running}
            limit = BEATEN[min(index, len(BEATEN) - 1)]
            left = [dtype for dtype in running if rates[dtype] * limit > max(rates.values())]
            for dtype in running:
                if dtype not in left or len(left) == 1:
                    del open_keys[name, dtype]
        if not open_keys:
            break
    return found


def _alpha(target: Target, draft: Draft, prompts: Sequence[Prompt], config: BenchConfig) -> dict[str, float] | None:
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
            "drafts": {n: trace(target.tokenizer, prompt.ids, r[i]) for n, r in runs.items() if n != PLAIN},
        }
        for i, prompt in enumerate(prompts[: config.traces])
    ]


def tau_interval(accepted: Mapping[str, Sequence[int]], tokens: Mapping[str, int]) -> dict[str, float]:
    """tau_pooled with its interval from a simulation: accepted tokens of every round and tokens, by row key."""
    keys = [key for key in accepted if accepted[key]]
    return ratio_of_sums([tokens[k] for k in keys], [len(accepted[k]) for k in keys]).to_dict()
