"""How much faster the offline estimate of tau is than decoding the same responses, and how well the two agree.

A chain decodes every prompt, greedily and with a sampler, and is timed. The texts it wrote, which are the target's
own, are then given to the offline estimate: features in one teacher-forced pass, the draft unrolled, rounds walked or
expected. Where the responses are still to be written, by the target in batches, their features are kept on the way
and no pass is needed; what keeping and storing them costs is measured too.

Greedy in float32 the rounds must be equal one by one. Sampled, rounds minus their expectation given the text has mean
zero, and the interval of the difference in tau must hold 0.

    python benchmarks/offline.py --out benchmarks/results/offline.json

Prompts are the embedded maths, or those of ``--prompts FILE``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft import provenance
from redraft.acceptance.simulate import expected_rounds_sampled, simulate_greedy_chain
from redraft.adaptation.models import open_draft, open_target, template_prompts
from redraft.artifact import atomic_write_json
from redraft.data import generate as generation
from redraft.data.generate import Features, Request
from redraft.data.prompts import read_conversations
from redraft.data.store import Row
from redraft.data.suites.maths import maths_conversations
from redraft.decode.engine import ChainDecoder
from redraft.decode.requests import Generation
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.evaluate.speed import Prompt
from redraft.evaluate.statistics import paired_difference, ratio_of_sums
from redraft.features import FeatureStore
from redraft.progress import Progress, progress_bar
from redraft.rows import anchors
from redraft.settings.sampler import Sampler
from redraft.target import Target, TargetStep

WANTED_SPEED = 20.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--adapter", help="PEFT adapter on the target")
    parser.add_argument("--draft", default="src/redraft/assets/general-draft")
    parser.add_argument("--prompts", type=Path, help="prompt file (default: embedded maths)")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="response tokens at most")
    parser.add_argument("--gamma", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    samplers = (Sampler(), Sampler(options.temperature, top_p=options.top_p))
    dtypes = options.dtypes.split(",")
    cells: list[dict[str, Any]] = []
    names: list[str] = []
    with progress_bar("decoding", len(dtypes) * len(samplers) * options.count, "responses") as progress:
        for dtype in dtypes:
            target = open_target(options.target, dtype, options.device, options.adapter)
            draft = open_draft(options.draft, target).draft
            prompts = load_prompts(options, target)
            names = [prompt.id for prompt in prompts]
            for sampler in samplers:
                cells.append(measure(target, draft, prompts, sampler, dtype, options, progress, len(cells)))
    result = {
        "schema": "redraft.offline/2",
        "provenance": provenance.collect(options.seed, options.device),
        "setup": {
            "target": options.target,
            "adapter": options.adapter,
            "draft": options.draft,
            "shape": f"chain of {options.gamma}",
            "prompts": names,
            "max_new_tokens": options.tokens,
            "batch": "decoding one response at a time, the estimate as many as its batches hold",
        },
        "cells": cells,
        "holds": all(cell["holds"] for cell in cells),
    }
    atomic_write_json(options.out, result)
    for cell in cells:
        print(line(cell))


def load_prompts(options: argparse.Namespace, target: Target) -> list[Prompt]:
    """The first ``--count`` prompts that leave room for an answer."""
    if options.prompts is None:
        found = maths_conversations(options.count, options.seed)
    else:
        found = read_conversations(options.prompts)[: options.count]
    return template_prompts(found, target, options.tokens)


def measure(
    target: Target,
    draft: Eagle3Draft,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    dtype: str,
    options: argparse.Namespace,
    progress: Progress,
    done: int,
) -> dict[str, Any]:
    """One cell: decode and time, estimate and time, compare."""
    target.tap(draft.config.taps)
    chain = ChainDecoder(target, draft, options.gamma, sampler)
    chain.generate(prompts[0].ids, min(8, options.tokens))  # warm-up
    decoded: list[Generation] = []
    for i, prompt in enumerate(prompts):
        decoded.append(chain.generate(prompt.ids, options.tokens, options.seed + i))
        progress.update(done * len(prompts) + i + 1)
    rows, rounds, seconds = [], {}, 0.0
    for i, (prompt, found) in enumerate(zip(prompts, decoded, strict=True)):
        seconds += found.prefill_seconds + found.decode_seconds
        sampling = (sampler.temperature, sampler.top_k, sampler.top_p, options.seed + i)
        row = Row(prompt.id, list(prompt.ids), found.ids, *sampling, found.finish_reason, "")
        if anchors(row):
            rows.append(row)
            rounds[row.key] = len(found.rounds)
    estimated, build_s, unroll_s = estimate(target, draft, rows, sampler, options.gamma)
    keys, tokens = [r.key for r in rows], [anchors(r) for r in rows]
    counted, expected = [rounds[k] for k in keys], [estimated[k] for k in keys]
    difference = paired_difference((tokens, expected), (tokens, counted))
    equal = sum(a == b for a, b in zip(counted, expected, strict=True))
    keeping = keep(target, rows, sampler, options.tokens)
    ratio, kept_ratio = seconds / (build_s + unroll_s), seconds / (keeping["kept"] + keeping["stored"] + unroll_s)
    exact = sampler.greedy and dtype == "float32"
    agrees = equal == len(rows) if exact else difference.low <= 0 <= difference.high or equal == len(rows)
    return {
        "dtype": dtype,
        "sampler": sampler.describe(),
        "draft_tokens": "greedy" if sampler.greedy else "sampled",
        "responses": len(rows),
        "tokens": sum(tokens),
        "tau_decoded": ratio_of_sums(tokens, counted).to_dict(),
        "tau_estimated": ratio_of_sums(tokens, expected).to_dict(),
        "tau_difference": difference.to_dict(),
        "responses_with_equal_rounds": equal,
        "seconds": {"decoding": seconds, "features": build_s, "unroll_and_walk": unroll_s, "keeping": keeping},
        "times_faster": {
            "features_by_a_pass": ratio,
            "features_kept_while_generating": kept_ratio,
            "features_at_hand": seconds / unroll_s,
        },
        "agrees": agrees,
        "holds": agrees and kept_ratio >= WANTED_SPEED,
        "per_response": [
            {"key": k, "tokens": t, "rounds": c, "expected_rounds": e}
            for k, t, c, e in zip(keys, tokens, counted, expected, strict=True)
        ],
    }


def estimate(
    target: Target, draft: Eagle3Draft, rows: Sequence[Row], sampler: Sampler, gamma: int
) -> tuple[dict[str, float], float, float]:
    """Rounds by row key, and the seconds of the two stages: features of the target, unroll of the draft."""
    with tempfile.TemporaryDirectory(prefix="redraft-offline-") as folder:
        began = time.perf_counter()
        store = FeatureStore(Path(folder), {})
        store.build(target, rows)
        built = time.perf_counter()
        if sampler.greedy:
            accepted = simulate_greedy_chain(draft, target, rows, store, gamma)
            found = {key: float(len(rounds)) for key, rounds in accepted.items()}
        else:
            found = expected_rounds_sampled(draft, target, rows, store, gamma, sampler)
        return found, built - began, time.perf_counter() - built


class TimedFeatures(Features):
    """Keeps features as generation does, and counts the seconds that it takes."""

    seconds = 0.0

    def begin(self, row: int, taps_PKH: Tensor) -> None:
        self._timed(super().begin, row, taps_PKH)

    def add(self, index_B: Tensor, step: TargetStep) -> None:
        self._timed(super().add, index_B, step)

    def take(self, row: int, length: int) -> Any:
        return self._timed(super().take, row, length)

    @staticmethod
    def _timed(call: Callable[..., Any], *arguments: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what the target has still to do is not ours
        began = time.perf_counter()
        found = call(*arguments)
        TimedFeatures.seconds += time.perf_counter() - began
        return found


def keep(target: Target, rows: Sequence[Row], sampler: Sampler, tokens: int) -> dict[str, float]:
    """Seconds of a batched generation, and those in it that keeping and storing features took.

    Timed from within: the difference of two generations would be lost in what they differ by anyway. The taps, which
    are there in either case, are joined outside of what is timed (some microseconds a step).
    """
    requests, by_key = [Request(row.key, row.prompt_ids, sampler, row.seed) for row in rows], {r.key: r for r in rows}
    TimedFeatures.seconds = 0.0
    generation.Features = TimedFeatures  # type: ignore[misc]
    began = time.perf_counter()
    found = list(generation.generate(target, requests, tokens, features=True))
    generated = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="redraft-offline-") as folder:
        FeatureStore(Path(folder), {}).put([(by_key[d.request.key], *d.features) for d in found if d.features])
    stored = time.perf_counter() - generated
    return {"generation": generated - began, "kept": TimedFeatures.seconds, "stored": stored}


def line(cell: dict[str, Any]) -> str:
    """A cell in one line, for the terminal."""
    decoded, found, gap = cell["tau_decoded"], cell["tau_estimated"], cell["tau_difference"]
    faster = cell["times_faster"]
    return (
        f"{cell['dtype']:9} {cell['sampler']:28} tau {decoded['value']:.3f} decoded, {found['value']:.3f} estimated "
        f"(difference {gap['low']:+.3f} to {gap['high']:+.3f}), {cell['responses_with_equal_rounds']} of "
        f"{cell['responses']} equal, {faster['features_kept_while_generating']:.1f}x faster with features kept, "
        f"{faster['features_by_a_pass']:.1f}x with a pass for them"
    )


if __name__ == "__main__":
    main()
