"""The target against transformers itself, on tiny random models of three architectures."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from redraft.errors import UserError
from redraft.target import FINAL, Target, default_taps, new_taps

ARCHITECTURES = ("llama", "qwen2", "qwen3")
pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_taps_hidden_states_and_logits_are_those_of_transformers(tiny_target: Callable, architecture: str) -> None:
    every = tuple(range(6))
    target = tiny_target(architecture, taps=every)
    tokens = ids(2, 11)
    expected = target.model(tokens, output_hidden_states=True, use_cache=False)
    step = target.forward(tokens)
    for k in every:
        assert torch.equal(step.taps_BTKH[..., k * 32 : (k + 1) * 32], expected.hidden_states[k]), k
    # after the last layer transformers gives the normed stream; that is what `hidden` is
    assert torch.equal(step.hidden_BTH, expected.hidden_states[6])
    assert torch.equal(target.logits(step.hidden_BTH), expected.logits)


@torch.inference_mode()
def test_the_last_tap_is_the_stream_before_the_final_norm(tiny_target: Callable, architecture: str) -> None:
    target = tiny_target(architecture, taps=(6,))
    step = target.forward(ids(1, 5))
    assert torch.equal(target.backbone.norm(step.taps_BTKH), step.hidden_BTH)
    assert not torch.allclose(step.taps_BTKH, step.hidden_BTH)


def test_taps_keep_the_order_they_were_asked_for(tiny_target: Callable, architecture: str) -> None:
    target, tokens = tiny_target(architecture, taps=(1, 4)), ids(1, 6)
    low, high = target.forward(tokens).taps_BTKH.split(32, -1)
    target.tap((4, 0, 1))
    again_high, embedded, again_low = target.forward(tokens).taps_BTKH.split(32, -1)
    assert torch.equal(low, again_low) and torch.equal(high, again_high)
    assert torch.equal(embedded, target.embedding(tokens))
    assert target.forward(tokens, taps=False).taps_BTKH is None
    assert not target._caught, "features outlive the forward pass"
    with pytest.raises(UserError, match="tap 7 does not exist"):
        target.tap((7,))
    with pytest.raises(UserError, match="tap -2 does not exist"):
        target.tap((-2,))


@torch.inference_mode()
def test_the_final_tap_is_the_state_that_the_head_reads(tiny_target: Callable, architecture: str) -> None:
    target = tiny_target(architecture, taps=(FINAL, 2))
    step = target.forward(ids(2, 7))
    final, second = step.taps_BTKH.split(32, -1)
    assert torch.equal(final, step.hidden_BTH)
    assert torch.equal(target.logits(final), target.model(ids(2, 7)).logits)
    target.tap((2,))
    assert torch.equal(target.forward(ids(2, 7)).taps_BTKH, second)
    assert not target._caught


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 1, 4), (8, 1), (1, 8)])
def test_cached_logits_equal_uncached_ones(tiny_target: Callable, architecture: str, chunks: tuple[int, ...]) -> None:
    target, tokens = tiny_target(architecture), ids(2, 9)
    whole = target.forward(tokens)
    theirs = target.model(tokens, use_cache=True).logits
    cache, at, hidden, taps = target.new_cache(9), 0, [], []
    for size in chunks:
        step = target.forward(tokens[:, at : at + size], cache)
        hidden.append(step.hidden_BTH)
        taps.append(step.taps_BTKH)
        at += size
    assert cache.length == 9
    torch.testing.assert_close(target.logits(torch.cat(hidden, 1)), theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(taps, 1), whole.taps_BTKH, rtol=1e-4, atol=1e-4)


def test_rolling_back_is_never_having_gone_there(tiny_target: Callable, architecture: str) -> None:
    target, tokens = tiny_target(architecture), ids(1, 12)
    straight, wandering = target.new_cache(16), target.new_cache(16)
    target.forward(tokens[:, :6], straight)
    target.forward(tokens[:, :6], wandering)
    for detour in (1, 5, 9):
        target.forward(ids(1, detour, seed=detour), wandering)
        wandering.rollback(6)
        assert wandering.length == 6
    expected, found = target.forward(tokens[:, 6:], straight), target.forward(tokens[:, 6:], wandering)
    assert torch.equal(expected.hidden_BTH, found.hidden_BTH)
    assert torch.equal(expected.taps_BTKH, found.taps_BTKH)
    for one, two in zip(straight.layers, wandering.layers, strict=True):
        assert torch.equal(one.keys[:, :, :12], two.keys[:, :, :12])
        assert torch.equal(one.values[:, :, :12], two.values[:, :, :12])


def test_rolling_back_to_the_start_and_wrong_lengths(tiny_target: Callable, architecture: str) -> None:
    target, tokens = tiny_target(architecture), ids(1, 6)
    cache = target.new_cache(6)
    first = target.forward(tokens, cache)
    cache.rollback(0)
    assert torch.equal(target.forward(tokens, cache).hidden_BTH, first.hidden_BTH)
    for wrong in (7, -1):
        with pytest.raises(ValueError, match="cannot roll"):
            cache.rollback(wrong)
    with pytest.raises(ValueError, match="cannot hold 7"):
        target.forward(tokens[:, :1], cache)


@torch.inference_mode()
@pytest.mark.parametrize("kept", [(0, 2, 5), (0, 1, 4), (0, 3), (0, 1), (0,), ()])
def test_a_compacted_tree_is_a_cache_that_saw_the_path_alone(
    tiny_target: Callable, architecture: str, kept: tuple[int, ...]
) -> None:
    """A root with children 1, 2, 3; 4 below 1 and 5 below 2: whichever path stays, decoding goes on as after it."""
    target, prompt, tree, following = tiny_target(architecture), ids(1, 5), ids(1, 6, seed=3), ids(1, 3, seed=4)
    parents, depths = (0, 0, 0, 0, 1, 2), (0, 1, 1, 1, 2, 2)
    mask = torch.ones(1, 1, 6, 11, dtype=torch.bool)
    mask[..., 5:] = torch.eye(6, dtype=torch.bool)
    for node in range(1, 6):
        mask[0, 0, node, 5:] |= mask[0, 0, parents[node], 5:]
    cache = target.new_cache(16)
    target.forward(prompt, cache)
    target.forward(tree, cache, 5 + torch.tensor([depths]), mask)
    cache.compact(5, kept)
    alone = target.new_cache(16)
    target.forward(torch.cat([prompt, tree[:, list(kept)]], 1), alone)
    assert cache.length == alone.length == 5 + len(kept)
    for one, two in zip(cache.layers, alone.layers, strict=True):
        torch.testing.assert_close(one.keys[:, :, : cache.length], two.keys[:, :, : cache.length], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            one.values[:, :, : cache.length], two.values[:, :, : cache.length], rtol=1e-4, atol=1e-4
        )
    found, expected = target.forward(following, cache), target.forward(following, alone)
    torch.testing.assert_close(found.hidden_BTH, expected.hidden_BTH, rtol=1e-4, atol=1e-4)


def test_compacting_refuses_rows_that_are_not_there(tiny_target: Callable, architecture: str) -> None:
    target = tiny_target(architecture)
    cache = target.new_cache(8)
    target.forward(ids(1, 6), cache)
    for wrong in ((0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="cannot keep rows"):
            cache.compact(3, wrong)
    with pytest.raises(ValueError, match="ascend"):
        cache.compact(3, (1, 0))
    assert cache.length == 6


@torch.inference_mode()
def test_a_tree_mask_hides_siblings(tiny_target: Callable, architecture: str) -> None:
    """Two candidates for one position, each seeing the prompt and itself, score as if each were alone."""
    target, prompt = tiny_target(architecture), ids(1, 5)
    cache = target.new_cache(8)
    target.forward(prompt, cache)
    mask = torch.ones(1, 1, 2, 7, dtype=torch.bool)
    mask[0, 0, 0, 6] = mask[0, 0, 1, 5] = False
    pair = target.forward(torch.tensor([[10, 20]]), cache, torch.tensor([[5, 5]]), mask)
    for i, token in enumerate((10, 20)):
        alone = target.forward(torch.cat([prompt, torch.tensor([[token]])], 1))
        torch.testing.assert_close(pair.hidden_BTH[:, i], alone.hidden_BTH[:, -1], rtol=1e-4, atol=1e-4)


def test_bfloat16_runs_and_stays_close(tiny_target: Callable, architecture: str) -> None:
    target, tokens = tiny_target(architecture), ids(2, 8)
    exact = target.forward(tokens).hidden_BTH
    half = Target(target.model.to(torch.bfloat16), taps=(2, 3)).forward(tokens)
    assert half.hidden_BTH.dtype == half.taps_BTKH.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.hidden_BTH.float(), exact, dim=-1).min() > 0.98


def test_the_target_is_frozen_and_its_figures_are_right(tiny_target: Callable, architecture: str) -> None:
    target = tiny_target(architecture)
    assert not any(p.requires_grad for p in target.model.parameters()) and not target.model.training
    assert not target.forward(ids(1, 3)).hidden_BTH.requires_grad
    assert (target.layers, target.hidden_size, target.vocab_size, target.context) == (6, 32, 128, 512)
    assert target.taps == new_taps(6) == (1, 3, 5) and default_taps(6) == (2, 3, 3)
    assert new_taps(30) == default_taps(30) == (2, 15, 27)
    assert all(list(new_taps(n)) == sorted({*new_taps(n)}) and new_taps(n)[-1] <= n for n in range(1, 12))
    assert target.eos_ids == (2,)
    everything = sum(p.numel() for p in target.model.parameters())
    assert target.parameters_per_token == everything - target.embedding.weight.numel()


def test_the_content_hash_tells_models_apart_and_dtypes_not(tiny_target: Callable, architecture: str) -> None:
    first = tiny_target(architecture).content_hash()
    assert first == tiny_target(architecture).content_hash()
    assert first != tiny_target(architecture, seed=1).content_hash()
    changed = tiny_target(architecture)
    changed.backbone.layers[3].mlp.down_proj.weight.add_(0.05)
    assert changed.content_hash() != first
    assert Target(tiny_target(architecture).model.to(torch.bfloat16)).content_hash() == first


def test_a_target_that_is_dropped_is_freed_at_once(tiny_target: Callable, architecture: str) -> None:
    """Two targets need twice the memory, and a garbage collection comes when it comes."""
    target = Target(copy.deepcopy(tiny_target(architecture).model), taps=(0, 1, 2))
    target.forward(torch.tensor([[1, 2, 3]]))
    weight = weakref.ref(target.head.weight)
    gc.collect()
    gc.disable()
    try:
        del target
        assert weight() is None
    finally:
        gc.enable()
