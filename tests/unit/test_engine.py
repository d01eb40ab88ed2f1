"""Chain decoding is lossless: with drafts that are good, stale, random, always wrong, or sure of the wrong thing."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from batched import BatchedChainDecoder

from redraft.data.generate import Request, generate
from redraft.decode.auto import make_decoder
from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.decode.requests import Generation, Uniforms
from redraft.drafts.eagle3 import fresh_draft
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import parse_shape
from redraft.target import Target

TOYS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toys.py"))))
make, prompts = TOYS.make_draft, TOYS.prompts


@pytest.fixture(scope="module")
def answered(tiny_target) -> Callable[[str], tuple[Target, list[Generation]]]:
    """``answered(architecture)`` -> a target and its own greedy answers to six prompts."""
    return TOYS.plain_answers(tiny_target, 6, 25)


# Without the overconfident draft: a greedy chain asks for the likeliest tokens alone, and its are the fresh one's.
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", [kind for kind in TOYS.KINDS if kind != "overconfident"])
def test_greedy_output_is_plain_decoding_token_for_token(kind, architecture, answered):
    target, answers = answered(architecture)
    chain = ChainDecoder(target, make(kind, target), gamma=4)
    found = [chain.generate(prompt, 25) for prompt in prompts(6)]
    for got, expected in zip(found, answers, strict=True):
        assert got.ids == expected.ids
        assert got.finish_reason == expected.finish_reason
        assert sum(len(r.kept) for r in got.rounds) == len(got.ids) - 1
    deepest = max(r.accepted for got in found for r in got.rounds)
    assert deepest >= 3 or kind in ("random", "wrong"), "nothing was kept or rolled back"


def test_a_draft_that_copies_the_target_is_accepted_and_still_lossless(tiny_target):
    """Without this the greedy test could pass with an engine that never accepts: here whole chains are kept."""
    target = tiny_target("llama")
    prompt = prompts(1)[0]
    expected = PlainDecoder(target).generate(prompt, 40)
    decoder = ChainDecoder(target, make("fresh", target), gamma=4)

    def oracle(request):
        done, gamma = len(request.ids), min(4, request.room)
        return (expected.ids[done : done + gamma] + [4] * gamma)[:gamma], None

    decoder.propose = oracle
    got = decoder.generate(prompt, 40)
    assert got.ids == expected.ids
    assert max(r.accepted for r in got.rounds) == 4


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("fresh", Sampler(1.0)), ("wrong", Sampler(0.7, 12)), ("overconfident", Sampler(1.3, 0, 0.6))],
    ids=lambda x: x if isinstance(x, str) else x.describe(),
)
def test_sampled_output_follows_the_target(kind, sampler, tiny_target):
    """Joint distribution of the second and third token, from a chain of two, by a chi-square test."""
    target = tiny_target("llama", num_hidden_layers=2)
    decoder = ChainDecoder(target, make(kind, target), gamma=2, sampler=sampler)
    assert TOYS.pairs_misfit(decoder, [5, 9, 70], 600) < 4.5


def test_uniforms_are_one_stream_however_they_are_taken():
    whole, parts = (Uniforms(3, torch.device("cpu")) for _ in range(2))
    expected, got = whole.take(1000), []
    for size in (1, 200, 56, 300, 2, 255, 180):
        got.append(parts.take(size))
        parts.take(4)
        parts.put_back(4)
    assert torch.equal(torch.cat(got), expected[:994])


def test_a_sequence_longer_than_the_context_is_refused(tiny_target):
    with pytest.raises(ValueError, match="do not fit"):
        PlainDecoder(tiny_target("llama")).generate([5] * 500, 100)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_batched_generation_equals_single_stream(architecture, tiny_target):
    target = tiny_target(architecture, **TOYS.SMALL)
    samplers = [Sampler(), Sampler(1.0), Sampler(0.8, 0, 0.9)]
    requests = [Request(str(i), p, samplers[i % 3]) for i, p in enumerate(prompts(18))]
    together = {c.request.key: c.response_ids for c in generate(target, requests, 24, batch_size=8)}
    alone = {c.request.key: c.response_ids for r in requests for c in generate(target, [r], 24, batch_size=1)}
    assert together == alone
    plain = PlainDecoder(target)
    for request in requests[::3]:
        assert plain.generate(list(request.prompt_ids), 24).ids == together[request.key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_of_a_run_is_answered_in_the_shapes_of_the_whole(dtype, tiny_target, monkeypatch):
    target = tiny_target("llama")
    target.model.to(dtype)
    requests = [Request(str(i), p, Sampler(0.8 * (i % 2))) for i, p in enumerate(prompts(18))]
    whole = {c.request.key: c.response_ids for c in generate(target, requests, 24, batch_size=8)}
    left = [r for i, r in enumerate(requests) if i % 3 == 1]
    assert target.dtype == dtype
    shapes, forward = set(), target.forward
    monkeypatch.setattr(target, "forward", lambda ids, *a, **k: (shapes.add(len(ids)), forward(ids, *a, **k))[1])
    resumed = {c.request.key: c.response_ids for c in generate(target, left, 24, batch_size=8, among=requests)}
    assert resumed == {r.key: whole[r.key] for r in left}
    assert shapes == {1, 8}  # prefill groups of one, all slots in every step


def test_rounds_are_told_as_they_come(tiny_target):
    target, told = tiny_target("llama"), []
    found = ChainDecoder(target, make("fresh", target), gamma=3).generate([5, 9, 70], 20, on_round=told.append)
    assert told[0].kept == found.ids[:1] and told[1:] == found.rounds
    assert [token for record in told for token in record.kept] == found.ids


@pytest.mark.parametrize("kind", ["chain:2", "tree:2x2x4", "batched"])
def test_decoding_leaves_the_draft_as_it_was_handed_in(kind, tiny_target):
    """Whoever probes a draft and trains it afterwards trains in float32, whatever the target decodes in."""
    target = tiny_target("llama")
    target.model.to(torch.bfloat16)
    draft = fresh_draft(target, range(100))
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    made = (
        BatchedChainDecoder(target, draft, 2) if kind == "batched" else make_decoder(target, draft, parse_shape(kind))
    )
    assert made.draft.fc.weight.dtype == torch.bfloat16
    after = draft.state_dict()
    assert all(
        tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) for name, tensor in before.items()
    )
    assert make_decoder(target, made.draft, parse_shape("chain:2")).draft is made.draft, "nothing is copied in vain"
