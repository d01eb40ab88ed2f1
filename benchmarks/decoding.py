"""Where a round's time goes: rounds of chains and trees against the model passes that they consist of.

Four questions, one result file:

- **passes**: a round's time over the sum of its target pass and its draft passes, each measured on its own. What is
  above 1 is the engine's.
- **length**: plain steps and rounds behind longer and longer texts. Only attention may grow.
- **batch**: eight sequences decoded together against one after another, same chain, same tokens.
- **bench**: what `redraft bench` adds around decoding.

    python benchmarks/decoding.py --out benchmarks/results/decoding.json

Times are medians; all that is compared is timed in turn, in one run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from batched import BatchedChainDecoder

from redraft import provenance
from redraft.adaptation.models import open_draft, open_target, template_prompts
from redraft.artifact import atomic_write_json
from redraft.data.suites.maths import maths_conversations
from redraft.decode.auto import measure_costs
from redraft.decode.engine import ChainDecoder
from redraft.decode.tree import Topology
from redraft.drafts.eagle.proposer import DraftCache
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.evaluate.speed import BenchConfig, bench
from redraft.settings.shapes import ChainShape, DynamicTree, Shape, StaticTree, parse_shape
from redraft.target import Target

SHAPES = ("chain:3", "chain:5", "[[0],[1],[2],[0,0],[0,1],[1,0],[0,0,0]]", "tree:4x4x12", "tree:5x10x60")
LENGTHS = (64, 256, 512, 1024, 1536)
TURNS = 7
STATED = {"passes": 1.1, "bench": 0.02}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--draft", default="src/redraft/assets/general-draft")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="response tokens of the batched part")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def text(target: Target, length: int) -> list[int]:
    """``length`` tokens of embedded maths questions."""
    ids: list[int] = []
    for conversation in maths_conversations(64, seed=5):
        ids += target.tokenizer.encode(conversation.messages[0]["content"], add_special_tokens=False)
    return (ids * (1 + length // len(ids)))[:length]


def timed(jobs: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of every job, one turn after another; the first turn warms up."""
    found: list[list[float]] = [[] for _ in jobs]
    for turn in range(repeats + 1):
        for times, job in zip(found, jobs, strict=True):
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]


# -- passes ----------------------------------------------------------------------------------------------------------
def tree_of(shape: Shape) -> Topology | None:
    """A tree of the shape's size for the target pass: a dynamic one is as wide as it can be at every level."""
    if isinstance(shape, ChainShape):
        return None
    if isinstance(shape, StaticTree):
        numbers = {path: i for i, path in enumerate(shape.paths, 1)}
        return Topology([numbers.get(path[:-1], 0) for path in shape.paths])
    level, parents = [0], list[int]()
    for _ in range(shape.depth):
        width = -(-shape.nodes // shape.depth)
        new = [len(parents) + 1 + i for i in range(min(width, shape.nodes - len(parents)))]
        parents += [level[i % len(level)] for i in range(len(new))]
        level = new or level
    return Topology(parents)


def target_pass(target: Target, ids: Sequence[int], shape: Shape) -> Callable[[], object]:
    """The target's pass over the last token and the proposals, its logits included."""
    tree = tree_of(shape)
    width = len(tree) if tree else shape.depth + 1
    cache = target.new_cache(len(ids) + width)
    prompt = torch.tensor([list(ids)], device=target.device)
    target.forward(prompt, cache)
    before, new = cache.length, prompt[:, :width]
    positions = mask = None
    if tree:
        positions = (torch.tensor(tree.depths, device=target.device) + before)[None]
        seen = torch.ones(width, before, dtype=torch.bool, device=target.device)
        mask = torch.cat([seen, tree.mask(target.device)], 1)[None, None]

    def run() -> None:
        with torch.inference_mode():
            target.logits(target.forward(new, cache, positions, mask).hidden_BTH[0])
            cache.rollback(before)

    return run


def draft_passes(target: Target, draft: Eagle3Draft, ids: Sequence[int], shape: Shape) -> Callable[[], object]:
    """The draft's passes of one round: one verified pair, then a pass a level; the head after each."""
    widths = [1] * shape.depth
    if isinstance(shape, DynamicTree):
        widths = [1] + [shape.top_k] * (shape.depth - 1)
    elif isinstance(shape, StaticTree):
        inner = set(shape.fans()) - {()}
        widths = [1] + [sum(len(p) == level for p in inner) for level in range(1, shape.depth)]
    cache = DraftCache(draft, len(ids) + sum(widths) + 1)
    length = len(ids) - 1
    taps_1F = draft.fc.weight.new_zeros(1, draft.fc.in_features)
    everyone = torch.tensor(list(ids), device=target.device)

    def run() -> None:
        with torch.inference_mode():
            cache.length = length
            state = draft.fuse(taps_1F)
            for level, width in enumerate(widths):
                positions = torch.full((width,), length + level, device=target.device)
                embeds = draft.embed(everyone[:width], target.embedding)
                state = draft(embeds, state[:1].expand(width, -1), positions, cache.attend)
                draft.logits(state)

    return run


def passes(target: Target, draft: Eagle3Draft, repeats: int) -> dict[str, Any]:
    """{shape: seconds of a round, of its passes, and the ratio}."""
    ids, found = text(target, 200), dict[str, Any]()
    for name in SHAPES:
        shape = parse_shape(name)
        chain = isinstance(shape, ChainShape)
        jobs = [target_pass(target, ids, shape), draft_passes(target, draft, ids, shape)]
        turns = []
        # Rounds and passes in turn, a few at a time: a machine that is slower for a while is slower for both.
        for _ in range(TURNS):
            costs = measure_costs(target, draft, ids, [shape.depth], () if chain else [shape], repeats=repeats // 3)
            round_cost = costs.rounds[shape]
            turns.append([round_cost.seconds, *timed(jobs, repeats // 3, target.device), costs.plain])
        whole, one, other, plain = (statistics.median(column) for column in zip(*turns, strict=True))
        found[shape.describe()] = {
            "round_ms": 1e3 * whole,
            "target_pass_ms": 1e3 * one,
            "draft_passes_ms": 1e3 * other,
            "plain_step_ms": 1e3 * plain,
            "round_over_passes": statistics.median(turn[0] / (turn[1] + turn[2]) for turn in turns),
        }
        print(f"{shape.describe()}: {found[shape.describe()]['round_over_passes']:.3f} of its passes", flush=True)
    return found


# -- length, batch, bench --------------------------------------------------------------------------------------------
def lengths(target: Target, draft: Eagle3Draft, repeats: int) -> list[dict[str, float]]:
    """A plain step and a round of a chain of 5 behind texts of growing length, in milliseconds."""
    found = []
    for length in LENGTHS:
        costs = measure_costs(target, draft, text(target, length), [5], repeats=repeats)
        found.append(
            {"length": length, "plain_ms": 1e3 * costs.plain, "round_ms": 1e3 * costs.rounds[ChainShape(5)].seconds}
        )
    return found


def batched(target: Target, draft: Eagle3Draft, batch: int, tokens: int) -> dict[str, Any]:
    """``batch`` sequences one after another and together; the texts, which bfloat16 may part, counted as equal."""
    asked = [p.ids for p in template_prompts(maths_conversations(batch, seed=6), target, tokens)]
    chain, together = ChainDecoder(target, draft, 3), BatchedChainDecoder(target, draft, 3, slots=batch)
    chain.generate(asked[0], 8)
    together.generate(asked, 8)
    start = time.perf_counter()
    alone = [chain.generate(prompt, tokens) for prompt in asked]
    middle = time.perf_counter()
    both = together.generate(asked, tokens)
    end = time.perf_counter()
    counts = [sum(len(run.ids) for run in runs) for runs in (alone, both)]
    return {
        "sequences": batch,
        "one_by_one_tokens_per_second": counts[0] / (middle - start),
        "together_tokens_per_second": counts[1] / (end - middle),
        "same_text": sum(a.ids == b.ids for a, b in zip(alone, both, strict=True)),
    }


def bench_overhead(target: Target, draft: Eagle3Draft) -> float:
    """Seconds that the benchmark adds around decoding, over those of decoding."""
    prompts = template_prompts(maths_conversations(4, seed=7), target, 48)
    config = BenchConfig(ChainShape(3), max_new_tokens=48)
    return float(bench({"as opened": target}, {"draft": draft}, prompts, config, {}).result["setup"]["overhead"])


def main() -> None:
    options = arguments()
    target = open_target(options.target, options.dtype, options.device)
    draft = open_draft(options.draft, target).draft.to(target.device, target.dtype).eval()
    target.tap(draft.config.taps)
    result = {
        "schema": "redraft.decoding/1",
        "setup": {"target": options.target, "draft": options.draft, "dtype": options.dtype, "greedy": True},
        "stated_limits": STATED,
        "passes": passes(target, draft, options.repeats),
        "length": lengths(target, draft, options.repeats),
        "batch": batched(target, draft, options.batch, options.tokens),
        "bench_overhead": bench_overhead(target, draft),
        "provenance": provenance.collect(seed=0, device=options.device),
    }
    atomic_write_json(options.out, result)
    print(f"bench overhead {result['bench_overhead']:.2%}; {options.out}")


if __name__ == "__main__":
    main()
