"""Batched chain decoding gives every request what it would get alone, whatever it is batched with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batched import BatchedChainDecoder

from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.errors import UserError
from redraft.settings.sampler import Sampler
from redraft.target import Target

# Half as deep as usual, with a draft on the last features: as good as more layers for telling batches from singles.
SMALL = {"num_hidden_layers": 3, "taps": (1, 2, 3)}


def make(target: Target, vocabulary: int = 120) -> Eagle3Draft:
    """A draft that is sometimes right: the fresh one, on targets of small weights."""
    return fresh_draft(target, list(range(vocabulary)), seed=1)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, 128, (1 + (5 * i) % 11,), generator=generator).tolist() for i in range(count)]


def rounds(generation) -> list[tuple[list[int], int, list[int]]]:
    return [(r.proposed, r.accepted, r.kept) for r in generation.rounds]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_greedy_batches_equal_single_sequences(architecture, tiny_target):
    """Round by round, with more prompts than slots, prompts of one token, and rows that accept differently."""
    target = tiny_target(architecture, initializer_range=0.05, **SMALL)
    draft, many = make(target), prompts(11)
    together = BatchedChainDecoder(target, draft, 4, slots=8).generate(many, 14)
    plain, single = PlainDecoder(target), ChainDecoder(target, draft, 4)
    alone = [single.generate(prompt, 14) for prompt in many]
    for prompt, got, expected in zip(many, together, alone, strict=True):
        assert got.ids == expected.ids == plain.generate(prompt, 14).ids
        assert got.finish_reason == expected.finish_reason
        assert rounds(got) == rounds(expected)
    accepted = {r.accepted for g in together for r in g.rounds}
    assert len(accepted) > 2, "rows must accept differently, or roll-back is not tested"


def test_layers_with_windows_draft_in_batches_what_they_draft_alone(tiny_target):
    target, options = tiny_target("llama", initializer_range=0.05, **SMALL), {"num_layers": 2, "windows": (3, 0)}
    draft = Eagle3Draft(replace(make(target).config, **options))
    draft.start(target, seed=1)
    many, single = prompts(11), ChainDecoder(target, draft, 4)
    together = BatchedChainDecoder(target, draft, 4, slots=8).generate(many, 14)
    assert [rounds(got) for got in together] == [rounds(single.generate(prompt, 14)) for prompt in many]
    assert len({r.accepted for g in together for r in g.rounds}) > 1


@pytest.mark.parametrize("greedy_drafts", [False, True], ids=["sampled drafts", "greedy drafts"])
@pytest.mark.parametrize("sampler", [Sampler(1.0), Sampler(0.7, 30, 0.9)], ids=lambda s: s.describe())
def test_sampled_batches_equal_single_sequences(sampler, greedy_drafts, tiny_target):
    target = tiny_target("llama", initializer_range=0.1, **SMALL)
    draft, many, seeds = make(target, 128), prompts(9), list(range(40, 49))
    decoder = BatchedChainDecoder(target, draft, 3, sampler, slots=8, greedy_drafts=greedy_drafts)
    together = decoder.generate(many, 14, seeds)
    single = ChainDecoder(target, draft, 3, sampler, greedy_drafts=greedy_drafts)
    alone = [single.generate(prompt, 14, seed) for prompt, seed in zip(many, seeds, strict=True)]
    assert [rounds(g) for g in together] == [rounds(g) for g in alone]
    assert [g.ids for g in together] == [g.ids for g in alone]
    assert sum(r.accepted for g in together for r in g.rounds) > 0
    # The same requests in other company: the other way round, three at a time.
    other = BatchedChainDecoder(target, draft, 3, sampler, slots=3, greedy_drafts=greedy_drafts)
    assert [g.ids for g in other.generate(many[::-1], 14, seeds[::-1])][::-1] == [g.ids for g in together]


def test_sequences_end_at_end_tokens_and_limits(tiny_target):
    """Slots are freed and filled again at different times; every prompt is answered once, and reported once."""
    target = tiny_target("llama", initializer_range=0.05, **SMALL)
    many = prompts(10)
    long = [PlainDecoder(target).generate(prompt, 12).ids for prompt in many]
    ends = sorted({ids[3] for ids in long if len(ids) > 3})[:3]
    target.config.eos_token_id = target.model.generation_config.eos_token_id = ends
    seen: list[int] = []
    decoder = BatchedChainDecoder(target, make(target), 4, slots=4)
    got = decoder.generate(many, 12, done=lambda index, generation: seen.append(index))
    expected = [PlainDecoder(target).generate(prompt, 12) for prompt in many]
    assert [g.ids for g in got] == [g.ids for g in expected]
    assert {g.finish_reason for g in got} == {g.finish_reason for g in expected} == {"stop", "length"}
    assert sorted(seen) == list(range(10)) and seen != sorted(seen)
    assert [len(g.ids) for g in got] == [1 + sum(len(r.kept) for r in g.rounds) for g in got]


def test_one_token_and_no_prompt(tiny_target):
    target = tiny_target("llama")
    decoder = BatchedChainDecoder(target, make(target), 4)
    assert decoder.generate([], 5) == []
    (one,) = decoder.generate([[5, 6]], 1)
    assert one.ids == PlainDecoder(target).generate([5, 6], 1).ids and one.rounds == []


def test_the_models_own_attention_comes_back(tiny_target):
    target = tiny_target("llama")
    before = target.model.config._attn_implementation
    BatchedChainDecoder(target, make(target), 2).generate(prompts(2), 3)
    assert target.model.config._attn_implementation == before


def test_what_cannot_be_decoded_is_refused(tiny_target):
    target = tiny_target("llama")
    draft = make(target)
    with pytest.raises(UserError, match="gamma"):
        BatchedChainDecoder(target, draft, 0)
    with pytest.raises(UserError, match="slot"):
        BatchedChainDecoder(target, draft, 2, slots=0)
    with pytest.raises(ValueError, match="do not fit"):
        BatchedChainDecoder(target, draft, 2).generate([[5], [5] * 500], 100)
    with pytest.raises(ValueError, match="seeds"):
        BatchedChainDecoder(target, draft, 2).generate([[5], [6]], 4, seeds=[1])
