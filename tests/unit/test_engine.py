"""Chain decoding is lossless: with drafts that are good, stale, random, always wrong, or sure of the wrong thing."""

from __future__ import annotations

import math

import pytest
import torch

from redraft.data.generate import Request, generate
from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.errors import UserError
from redraft.sampling import Sampler, warp
from redraft.target import Target

KINDS = ("fresh", "random", "wrong", "overconfident", "whole vocabulary")


def make(kind: str, target: Target) -> Eagle3Draft:
    vocabulary = range(target.vocab_size) if kind == "whole vocabulary" else range(0, 120)
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_plain_decoding_token_for_token(kind, architecture, tiny_target):
    target = tiny_target(architecture)
    plain, chain = PlainDecoder(target), ChainDecoder(target, make(kind, target), gamma=4)
    for prompt in prompts(6):
        expected, got = plain.generate(prompt, 33), chain.generate(prompt, 33)
        assert got.ids == expected.ids
        assert got.finish_reason == expected.finish_reason
        assert sum(len(r.kept) for r in got.rounds) == len(got.ids) - 1


def test_a_draft_that_copies_the_target_is_accepted_and_still_lossless(tiny_target):
    """Without this the greedy test could pass with an engine that never accepts: here whole chains are kept."""
    target = tiny_target("llama")
    prompt = prompts(1)[0]
    expected = PlainDecoder(target).generate(prompt, 40)
    decoder = ChainDecoder(target, make("fresh", target), gamma=4)

    def oracle(ids, taps, cache, gamma, uniforms):
        done = len(produced)
        cache.length += len(ids)
        return (expected.ids[done : done + gamma] + [4] * gamma)[:gamma], None

    produced: list[int] = [expected.ids[0]]
    verify = decoder.verify

    def watch(last, proposed, probs, cache, uniforms):
        record, ids, taps = verify(last, proposed, probs, cache, uniforms)
        produced.extend(record.kept)
        return record, ids, taps

    decoder.propose, decoder.verify = oracle, watch
    got = decoder.generate(prompt, 40)
    assert got.ids == expected.ids
    assert max(r.accepted for r in got.rounds) == 4


def folded_pairs(target: Target, sampler: Sampler, prompt: list[int], firsts: dict[int, int]) -> torch.Tensor:
    """Expected counts [8, 8] of the second and third token, ids folded modulo 8, given the drawn first tokens.

    Exact: every second token is followed up, end tokens left out, since they end a response before the third.
    """
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
    return expected


@pytest.mark.parametrize("kind", ["fresh", "wrong", "overconfident"])
@pytest.mark.parametrize("sampler", [Sampler(1.0), Sampler(0.7, 12), Sampler(1.3, 0, 0.6)], ids=lambda s: s.describe())
def test_sampled_output_follows_the_target(kind, sampler, tiny_target):
    """Joint distribution of the second and third token, from a chain of two, by a chi-square test."""
    target = tiny_target("llama")
    decoder = ChainDecoder(target, make(kind, target), gamma=2, sampler=sampler)
    prompt, observed = [5, 9, 70], torch.zeros(8, 8, dtype=torch.float64)
    firsts: dict[int, int] = {}
    for seed in range(1200):
        ids = decoder.generate(prompt, 3, seed=seed).ids
        if len(ids) == 3:
            firsts[ids[0]] = firsts.get(ids[0], 0) + 1
            observed[ids[1] % 8, ids[2] % 8] += 1
    expected = folded_pairs(target, sampler, prompt, firsts)
    large = expected > 4
    statistic = float(((observed - expected)[large] ** 2 / expected[large]).sum())
    cells = int(large.sum())
    assert cells >= 4
    assert statistic < cells + 4.5 * math.sqrt(2 * cells)


@pytest.mark.parametrize("gamma", [0, -1])
def test_gamma_must_be_positive(gamma, tiny_target):
    target = tiny_target("llama")
    with pytest.raises(UserError, match="gamma"):
        ChainDecoder(target, make("fresh", target), gamma=gamma)


def test_a_sequence_longer_than_the_context_is_refused(tiny_target):
    with pytest.raises(ValueError, match="do not fit"):
        PlainDecoder(tiny_target("llama")).generate([5] * 500, 100)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_batched_generation_equals_single_stream(architecture, tiny_target):
    target = tiny_target(architecture)
    samplers = [Sampler(), Sampler(1.0), Sampler(0.8, 0, 0.9)]
    requests = [Request(str(i), p, samplers[i % 3]) for i, p in enumerate(prompts(30))]
    together = {c.request.key: c.response_ids for c in generate(target, requests, 24, batch_size=8)}
    alone = {c.request.key: c.response_ids for r in requests for c in generate(target, [r], 24, batch_size=1)}
    assert together == alone
    plain = PlainDecoder(target)
    for request in requests[::3]:
        assert plain.generate(list(request.prompt_ids), 24).ids == together[request.key]
