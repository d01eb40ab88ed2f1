"""Losslessness on the device: greedy texts equal plain decoding's, and draws follow the exact distribution.

Greedy texts are compared in float32. A pass over several tokens goes through other kernels than a pass over one, so
that a near-tie of the target could part two texts without a mistake in the rule: of every difference the gap is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from batched import BatchedChainDecoder
from faults.drawing.counting import Tested, every_test, holm
from faults.drawing.drawn import draws_of, written
from faults.drawing.world import DRAFTS, LIMIT, SAMPLERS, make_world

from onecard.common import Section, Shape, make_target
from redraft.data.generate import Request, generate
from redraft.data.store import Row
from redraft.decode.auto import make_decoder
from redraft.decode.engine import PlainDecoder
from redraft.decode.static import StaticChainDecoder, StaticTarget
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.evaluate.divergence import explain
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import parse_shape
from redraft.settings.training import TrainConfig
from redraft.target import Target
from redraft.training.trainer import Trainer

SHAPE = Shape(256, 8, 4, 512, 400, 200, layers=6)
TINY = Shape(32, 4, 2, 64, 128, 64, layers=6)
GAMMA = 4
SHAPES = (f"chain:{GAMMA}", "tree:4x3x10", "[[0],[1],[0,0],[0,1],[0,0,0]]")
# The target of the benchmark of draws; decoders of one sequence, whose draws are dear, and those of many.
WORLD = 6
SINGLE, MANY = ("chain", "tree", "dynamic tree", "static chain"), "batched"
BELOW = 0.01


def run(section: Section) -> None:
    shape, prompts, tokens = (TINY, 2, 12) if section.tiny else (SHAPE, 8, 64)
    target = make_target(shape, section.device, torch.float32)
    generator = torch.Generator().manual_seed(1)
    lengths = [5 + 7 * number for number in range(prompts)]
    asked = [torch.randint(shape.vocabulary, (length,), generator=generator).tolist() for length in lengths]
    section.put("what of ours equals the model's own passes", target.verdict())
    texts = Texts(section, target, asked, tokens)
    draft = learned(section, target, shape, asked, tokens)
    for name in SHAPES:
        section.attempt(f"greedy {name}", lambda: texts.compare(make_decoder(target, draft, parse_shape(name))))  # noqa: B023
    capacity = max(lengths) + tokens
    section.attempt("greedy recorded plain", lambda: texts.compare(PlainDecoder(StaticTarget(target, (1,), capacity))))
    static = StaticChainDecoder(target, draft, GAMMA, capacity=capacity)
    section.attempt("greedy recorded chain", lambda: texts.compare(static))
    batched = BatchedChainDecoder(target, draft, GAMMA, slots=3)
    section.attempt("greedy batch of chains", lambda: texts.matched([g.ids for g in batched.generate(asked, tokens)]))
    section.attempt("greedy batch without a draft", lambda: texts.matched(texts.written()))
    section.attempt("draws", lambda: draws(section), least=0.0 if section.tiny else 10.0)


def learned(section: Section, target: Target, shape: Shape, asked: Sequence[Sequence[int]], tokens: int) -> Eagle3Draft:
    """A draft that has learned the target's own answers to these prompts, so that rounds keep some proposals and lose
    others: answers written in batches, their states kept on the way, and trained on."""
    requests = [Request(str(number), prompt, Sampler()) for number, prompt in enumerate(asked)]
    known, rows = dict[str, Any](), []
    for done in generate(target, requests, tokens, len(asked), features=True):
        prompt = list(done.request.prompt_ids)
        row = Row(done.request.key, prompt, done.response_ids, 0.0, 0, 1.0, 0, done.finish_reason, "random")
        rows.append(row)
        known[row.key] = done.features
    config = TrainConfig(epochs=40 if section.tiny else 60, batch_anchors=200, evaluate_every=20, learning_rate=1e-2)
    said = dict.fromkeys([token for row in rows for token in row.response_ids] + list(range(shape.vocabulary)))
    draft = fresh_draft(target, sorted(list(said)[: shape.draft_vocabulary]))
    features = SimpleNamespace(get=lambda row: known[row.key])
    result = Trainer(draft, target, features, rows, rows, config, section.work / "draft").run()
    section.put("draft", {"held_out_tau": [result.start_tau, result.best_tau], "steps": result.steps})
    return draft.requires_grad_(False)


class Texts:
    """What plain decoding writes, and how other texts differ from it."""

    def __init__(self, section: Section, target: Target, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self.section, self.target, self.prompts, self.tokens = section, target, prompts, tokens
        plain = PlainDecoder(target)
        self.plain = [plain.generate(prompt, tokens).ids for prompt in prompts]

    def compare(self, decoder: PlainDecoder) -> dict[str, Any]:
        """A decoder's texts beside the plain ones, and how many tokens a round it kept."""
        found = [decoder.generate(prompt, self.tokens) for prompt in self.prompts]
        rounds = sum(len(one.rounds) for one in found)
        tau = {"tau_pooled": sum(len(one.ids) - 1 for one in found) / rounds} if rounds else {}
        return self.matched([one.ids for one in found]) | tau

    def written(self) -> list[list[int]]:
        """What the target writes to all prompts in one batch."""
        asked = [Request(str(number), prompt, Sampler()) for number, prompt in enumerate(self.prompts)]
        done = {int(one.request.key): one.response_ids for one in generate(self.target, asked, self.tokens, 3)}
        return [done[number] for number in range(len(asked))]

    def matched(self, found: Sequence[Sequence[int]]) -> dict[str, Any]:
        """How many texts are the same, and every first difference."""
        parted = []
        for prompt, plain, other in zip(self.prompts, self.plain, found, strict=True):
            difference = explain(prompt, plain, list(other), self.target, self.target)
            if difference is not None:
                parted.append(asdict(difference) | {"near_tie": difference.near_tie})
        same = len(found) - len(parted)
        return {"texts": len(found), "identical": same, "differences": parted, "holds": not parted}


# -- draws -------------------------------------------------------------------------------------------------------------
def draws(section: Section) -> dict[str, Any]:
    """Every decoder under every sampler with every wrong draft, as many draws as the time allows."""
    world = make_world(WORLD, str(section.device))
    tests: list[tuple[str, Tested]] = []
    counts: dict[str, int] = {}
    began = time.monotonic()
    allowed = min(4.0 if section.tiny else 45.0, section.left - 3.0)
    # A sampler and a draft in turn for each decoder of one sequence; batches and writing take them all.
    cells = list(product(SINGLE, range(len(SAMPLERS))))
    for number, (decoder, which) in enumerate(cells):
        share = (0.7 * allowed - (time.monotonic() - began)) / (len(cells) - number)
        sampler, draft = SAMPLERS[which], DRAFTS[which]
        count = affordable(share, lambda n: draws_of(decoder, world, sampler, draft, n, LIMIT, 5), 8, 600)  # noqa: B023
        found = draws_of(decoder, world, sampler, draft, count, LIMIT, (number + 1) * 1_000_000)
        counts[decoder] = counts.get(decoder, 0) + count
        tests += [(f"{decoder}, {sampler.describe()}, {draft}", one) for one in every_test(found, world.probs(sampler))]
    many = 60 if section.tiny else 1500
    for which, sampler in enumerate(SAMPLERS):
        found = draws_of(MANY, world, sampler, DRAFTS[which], many, LIMIT, (100 + which) * 1_000_000)
        counts[MANY] = counts.get(MANY, 0) + many
        tests += [(f"{MANY}, {sampler.describe()}", one) for one in every_test(found, world.probs(sampler))]
    for sampler, found in written(world, many, LIMIT, 7).items():
        counts["without a draft"] = counts.get("without a draft", 0) + many
        tests += [(f"without a draft, {sampler.describe()}", one) for one in every_test(found, world.probs(sampler))]
    corrected = holm([one.p for _, one in tests])
    least = min(range(len(tests)), key=corrected.__getitem__)
    return {
        "draws": counts,
        "tests": len(tests),
        "least_p": tests[least][1].p,
        "least_p_corrected": corrected[least],
        "of": f"{tests[least][0]}: {tests[least][1].test}",
        "holds": corrected[least] >= BELOW,
    }


def affordable(seconds: float, work: Callable[[int], Any], few: int, most: int) -> int:
    """How many draws ``seconds`` allow, by the time that a ``few`` take; never fewer than these."""
    began = time.monotonic()
    work(few)
    return max(few, min(most, int(few * seconds / (time.monotonic() - began)) - few))
