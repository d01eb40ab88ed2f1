"""What the decoding tests share: toy language models with an exact statistic, and tiny drafts of every temper.

A toy language model is a table of probabilities [V + 1, V]: row v follows token v, row V starts the text. Test files
load this one with ``runpy``.

Shape legend: B independent texts, V vocabulary of the toy.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from redraft.decode.engine import PlainDecoder
from redraft.decode.requests import Generation
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.sampling import draw, warp
from redraft.settings.sampler import Sampler
from redraft.target import Target

V, DRAWS = 5, 20_000
# A broken rule has to stand out, and the rule itself must not when it is looked at as closely.
MANY = 60_000

# Every combination of temperature, top-k and top-p, and greedy.
SAMPLERS = [Sampler(), *(Sampler(*rule) for rule in itertools.product((1.0, 0.6), (0, 3), (1.0, 0.8)))]
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=Sampler.describe)


def target_logits() -> Tensor:
    return torch.randn(V + 1, V, generator=torch.Generator().manual_seed(7)) * 1.5


def normalised(probs: Tensor) -> Tensor:
    return probs / probs.sum(-1, keepdim=True)


def toy_drafts(sampler: Sampler) -> dict[str, Tensor]:
    """Draft probabilities [V + 1, V] from nearly right to as wrong as can be."""
    logits = target_logits()
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(8))
    target = warp(logits, sampler)
    unlikely = torch.nn.functional.one_hot(target.argmin(-1), V).float()
    return {
        "good": warp(logits + 0.3 * noise, sampler),
        "wrong": warp(-logits, sampler),
        "overconfident": warp(4 * logits + noise, sampler),
        "uniform": torch.full_like(target, 1 / V),
        "argmax": torch.nn.functional.one_hot(logits.argmax(-1), V).float(),
        "disjoint": normalised(torch.where(target == 0, 1.0, 0.0) + unlikely),
    }


def toy_pair(sampler: Sampler, kind: str) -> tuple[Tensor, Tensor]:
    """The target's probabilities and those of one of its drafts, both [V + 1, V]."""
    return warp(target_logits(), sampler), toy_drafts(sampler)[kind]


def continued(target: Tensor, tokens_B3: Tensor, known_B: Tensor, generator: torch.Generator) -> Tensor:
    """The texts with everything after their first ``known`` tokens drawn plainly."""
    tokens = tokens_B3.clone()
    for position in range(1, tokens.shape[1]):
        uniforms = torch.rand(len(tokens), generator=generator, dtype=torch.float64)
        plain = draw(target[tokens[:, position - 1]], uniforms)
        tokens[:, position] = torch.where(known_B <= position, plain, tokens[:, position])
    return tokens


def misfit(tokens_B3: Tensor, target: Tensor) -> float:
    """Standard score of the G statistic of the joint counts against the exact joint distribution of three tokens.

    The chi-square distribution is mapped to a normal one (Wilson and Hilferty 1931). Cells with fewer than five
    expected draws are pooled; one draw in a cell of probability zero is an infinite misfit.
    """
    joint = target[V][:, None, None] * target[:, :, None][:V] * target[None, :V]
    expected = (joint.double() / joint.double().sum() * len(tokens_B3)).flatten()
    places = (tokens_B3[:, 0] * V + tokens_B3[:, 1]) * V + tokens_B3[:, 2]
    seen = torch.bincount(places, minlength=V**3).double()
    if seen[expected == 0].any():
        return math.inf
    rare = (expected < 5) & (expected > 0)
    pooled_seen = torch.cat([seen[expected >= 5], seen[rare].sum()[None]])
    pooled_expected = torch.cat([expected[expected >= 5], expected[rare].sum()[None]])
    cells = pooled_expected > 0
    statistic = 2 * torch.special.xlogy(pooled_seen[cells], pooled_seen[cells] / pooled_expected[cells]).sum()
    freedom = int(cells.sum()) - 1
    if freedom == 0:
        return 0.0
    spread = 2 / (9 * freedom)
    return float(((statistic.clamp(min=0) / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


# The parts of the rejection rule as the papers state them, for tests to put together, whole or broken.
def right_accepts(u: Tensor, tx: Tensor, dx: Tensor) -> Tensor:
    return (dx > 0) & (u < tx / dx)


def right_residual(t: Tensor, d: Tensor, dx: Tensor) -> Tensor:
    positive = (t - d).clamp(min=0)
    fresh = (dx == 0)[:, None] | (positive.sum(-1, keepdim=True) == 0)
    return torch.where(fresh, t, positive)


# -- tiny drafts for tiny targets --------------------------------------------------------------------------------------
# A target for tests that compare one way of decoding with another: half as deep as the usual one, and a fresh draft on
# its last features is right in a fifth of all rounds and more, so that there is something to keep and to roll back.
SMALL = {"seed": 2, "num_hidden_layers": 3, "taps": (1, 2, 3)}
KINDS = ("fresh", "random", "wrong", "overconfident", "whole vocabulary")


def make_draft(kind: str, target: Target) -> Eagle3Draft:
    vocabulary = range(target.vocab_size - (0 if kind == "whole vocabulary" else 8))
    draft = fresh_draft(target, list(vocabulary), seed=1)
    with torch.no_grad():
        if kind == "random":
            for parameter in draft.parameters():
                parameter.normal_(std=0.5)
        if kind == "wrong":
            # The least likely token by its own lights, with certainty.
            draft.lm_head.weight.mul_(-40)
        if kind == "overconfident":
            draft.lm_head.weight.mul_(40)
    return draft


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, 128, (3 + i % 9,), generator=generator).tolist() for i in range(count)]


def plain_answers(
    tiny_target: Callable[..., Target], count: int, tokens: int
) -> Callable[[str], tuple[Target, list[Generation]]]:
    """A function of the architecture: a small target and its own greedy answers to the prompts, made once."""

    @functools.cache
    def answer(architecture: str) -> tuple[Target, list[Generation]]:
        target = tiny_target(architecture, **SMALL)
        return target, [PlainDecoder(target).generate(prompt, tokens) for prompt in prompts(count)]

    return answer


def pairs_misfit(decoder, prompt: list[int], seeds: int) -> float:
    """Standard score of the joint counts of a decoder's second and third token, ids folded modulo 8.

    The expected counts are exact, given the first tokens that prefill drew: every second token is followed up, end
    tokens left out, since they end a response before the third.
    """
    target, sampler = decoder.target, decoder.sampler
    observed, firsts = torch.zeros(8, 8, dtype=torch.float64), dict[int, int]()
    for seed in range(seeds):
        ids = decoder.generate(prompt, 3, seed=seed).ids
        if len(ids) == 3:
            firsts[ids[0]] = firsts.get(ids[0], 0) + 1
            observed[ids[1] % 8, ids[2] % 8] += 1
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for first, count in firsts.items():
        step = target.forward(torch.tensor([[*prompt, first]]), taps=False)
        second = warp(target.logits(step.hidden_BTH[0, -1:]), sampler)[0].double()
        second[list(target.eos_ids)] = 0
        second /= second.sum()
        tokens = second.nonzero().squeeze(-1)
        step = target.forward(torch.tensor([[*prompt, first, t] for t in tokens.tolist()]), taps=False)
        third = warp(target.logits(step.hidden_BTH[:, -1]), sampler).double()
        folded = torch.zeros(len(tokens), 8, dtype=torch.float64)
        folded.index_add_(1, torch.arange(third.shape[1]) % 8, third)
        expected.index_add_(0, tokens % 8, count * second[tokens, None] * folded)
    large = expected > 4
    cells = int(large.sum())
    assert cells >= 4
    statistic = float(((observed - expected)[large] ** 2 / expected[large]).sum())
    return (statistic - cells) / math.sqrt(2 * cells)
