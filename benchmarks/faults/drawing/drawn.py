"""Draws from every decoder, with what became of each token on the way.

Shape legend: N draws, L limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from batched import BatchedChainDecoder
from torch import Tensor

from faults.drawing.world import CONTEXT, END, PROMPTS, SAMPLERS, V, World, make_draft
from redraft.data.generate import Request, generate
from redraft.decode.auto import make_decoder
from redraft.decode.requests import Generation
from redraft.decode.static import StaticChainDecoder
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, DynamicTree, StaticTree

GAMMA, SLOTS = 2, 256
# Where a token came from: the pass over the prompt, a proposal, the rule's own draw after a rejection or after a whole
# proposal, or plain decoding. NONE stands behind the end of an answer.
FIRST, ACCEPTED, CORRECTION, BONUS, PLAIN, NONE = range(6)
SHAPES = {
    "chain": ChainShape(GAMMA),
    "tree": StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0))),
    "dynamic tree": DynamicTree(depth=GAMMA, top_k=3, nodes=6),
}
# A dynamic tree takes greedy drafts alone, and only a greedy chain is drafted in one static step.
DECODERS = ("chain", "tree", "dynamic tree", "static chain", "batched")
# What writes a draft's training text, without any draft.
WRITER = "generate"


@dataclass(frozen=True)
class Draws:
    """Answers: the number of each one's prompt [N], tokens [N, L] with ``V`` behind the end, and where tokens came
    from [N, L]. ``ended_inside`` counts answers whose end token had further accepted tokens behind it. ``apart`` are
    the distances between draws that stood beside each other in a batch."""

    prompts: Tensor
    tokens: Tensor
    origins: Tensor
    ended_inside: int = 0
    apart: tuple[int, ...] = (1,)


def draws_of(decoder: str, world: World, sampler: Sampler, draft: str, count: int, limit: int, seed: int) -> Draws:
    """``count`` answers of at most ``limit`` tokens to the prompts in turn, with seeds that follow each other."""
    model = make_draft(draft, world)
    asked = [PROMPTS[number % len(PROMPTS)] for number in range(count)]
    seeds = range(seed, seed + count)
    if decoder == "batched":
        batched = BatchedChainDecoder(world.target, model, GAMMA, sampler, SLOTS)
        # Prompts of one length are admitted side by side: every other draw.
        return gathered(batched.generate(asked, limit, seeds), limit, apart=(1, len(PROMPTS)))
    if decoder == "static chain":
        single = StaticChainDecoder(world.target, model, GAMMA, sampler, True, CONTEXT // 4)
    else:
        single = make_decoder(world.target, model, SHAPES[decoder], sampler, decoder == "dynamic tree")
    return gathered((single.generate(p, limit, s) for p, s in zip(asked, seeds, strict=True)), limit)


def gathered(found: Iterable[Generation], limit: int, apart: Sequence[int] = (1,)) -> Draws:
    """Speculative answers as tensors. Raises ``ValueError`` where an answer and its rounds disagree."""
    tokens, origins, inside = list[list[int]](), list[list[int]](), 0
    for one in found:
        ids, came = [one.ids[0]], [FIRST]
        for record in one.rounds:
            last = BONUS if record.full else CORRECTION
            ids += record.kept
            came += [ACCEPTED if place < record.accepted else last for place in range(len(record.kept))]
            inside += record.kept[-1] == END and len(record.kept) <= record.accepted
        if ids != one.ids or len(ids) > limit or (one.finish_reason == "stop") != (ids[-1] == END):
            raise ValueError(f"an answer of {one.ids} and its rounds {ids} disagree; limit {limit}")
        tokens.append(ids + [V] * (limit - len(ids)))
        origins.append(came + [NONE] * (limit - len(ids)))
    prompts = torch.arange(len(tokens)) % len(PROMPTS)
    return Draws(prompts, torch.tensor(tokens), torch.tensor(origins), inside, tuple(apart))


def written(world: World, count: int, limit: int, seed: int) -> dict[Sampler, Draws]:
    """``count`` answers of plain sampling for every sampler, all of them in the same batches."""
    asked = [
        Request(f"{number}@{sampler.describe()}", PROMPTS[number % len(PROMPTS)], sampler, seed)
        for number in range(count)
        for sampler in SAMPLERS
    ]
    answers = {done.request.key: done.response_ids for done in generate(world.target, asked, limit, SLOTS)}
    found = {}
    for sampler in SAMPLERS:
        ids = [answers[request.key] for request in asked if request.sampler == sampler]
        tokens = torch.tensor([one + [V] * (limit - len(one)) for one in ids])
        origins = torch.where(tokens == V, NONE, PLAIN)
        found[sampler] = Draws(torch.arange(count) % len(PROMPTS), tokens, origins, 0, (1, len(PROMPTS)))
    return found
