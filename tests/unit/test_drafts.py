"""Shared and private experts, parameter groups, and the Eagle3 draft's own properties."""

from __future__ import annotations

import copy

import pytest
import torch

from redraft.artifact import load_private, save_private, tensors_hash
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft, check_fit, fresh_draft
from redraft.drafts.experts import attach_low_rank, attach_private, is_private, linear_names, merge_private
from redraft.drafts.groups import (
    GROUPS,
    LOW_RANK,
    METHODS,
    PrivateSize,
    group_of,
    method,
    prepare,
    trainable_names,
    trained_parameters,
)
from redraft.errors import UserError
from redraft.target import Target


def causal(query, key, value):
    """Plain causal attention over [T, heads, width], written out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    mask = torch.ones(len(query), len(key), dtype=torch.bool).tril()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), value)


def run(draft: Eagle3Draft, target: Target, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, target.vocab_size, (9,), generator=generator)
    taps = torch.randn(9, len(draft.config.taps) * target.hidden_size, generator=generator)
    with torch.no_grad():
        embeds = draft.embed(ids, target.embedding)
        return draft.logits(draft(embeds, draft.fuse(taps), torch.arange(9), causal))


@pytest.fixture
def draft(tiny_target) -> Eagle3Draft:
    return fresh_draft(tiny_target("llama"), range(0, 120, 2), seed=3)


def test_attaching_a_private_part_changes_no_bit(draft, tiny_target):
    target = tiny_target("llama")
    assert torch.equal(run(draft, target), run(attach_private(draft, 24, seed=5), target))


def test_a_width_beyond_the_shared_one_attaches_too(draft, tiny_target):
    target = tiny_target("llama")
    assert torch.equal(run(draft, target), run(attach_private(draft, 200), target))


def test_merging_gives_an_equal_dense_draft(draft, tiny_target):
    target = tiny_target("llama")
    split = attach_private(draft, 24)
    torch.nn.init.normal_(split.midlayer.mlp.private.down_proj.weight, std=0.3)
    merged = merge_private(split)
    assert not any(map(is_private, merged.state_dict()))
    assert merged.config.intermediate_size == draft.config.intermediate_size + 24
    assert not torch.allclose(run(draft, target), run(split, target), atol=1e-3)
    torch.testing.assert_close(run(split, target), run(merged, target), atol=1e-5, rtol=0)


def test_attaching_low_rank_updates_changes_no_bit(draft, tiny_target):
    target = tiny_target("llama")
    assert torch.equal(run(draft, target), run(attach_low_rank(draft, 3), target))


@pytest.mark.parametrize("on", [(), ("fc",), ("lm_head", "midlayer.mlp.down_proj")])
def test_merging_low_rank_updates_gives_an_equal_dense_draft(on, draft, tiny_target):
    target = tiny_target("llama")
    split = attach_private(attach_low_rank(draft, 3, on), 8)
    for name, parameter in split.named_parameters():
        if is_private(name):
            torch.nn.init.normal_(parameter, std=0.3)
    merged = merge_private(split)
    assert not any(map(is_private, merged.state_dict()))
    assert {n.split(".low_rank")[0] for n in split.state_dict() if "low_rank" in n} == set(on or linear_names(draft))
    assert not torch.allclose(run(draft, target), run(split, target), atol=1e-3)
    torch.testing.assert_close(run(split, target), run(merged, target), atol=1e-5, rtol=1e-5)


def test_low_rank_updates_need_a_rank_and_layers_that_exist(draft):
    with pytest.raises(ValueError, match="rank 0"):
        attach_low_rank(draft, 0)
    with pytest.raises(ValueError, match="on norm"):
        attach_low_rank(draft, 2, ["norm"])


def test_a_second_private_part_is_refused(draft):
    with pytest.raises(ValueError, match="merge it first"):
        attach_private(attach_private(draft, 8), 8)
    with pytest.raises(ValueError, match="merge them first"):
        attach_low_rank(attach_low_rank(draft, 2), 2)


@pytest.mark.parametrize("name", ["eda+fc", "lora"])
def test_a_private_part_alone_is_saved_and_put_over_the_shared_draft(name, draft, tiny_target, tmp_path):
    target = tiny_target("llama")
    split, names = prepare(draft, name, PrivateSize(24, 2))
    for parameter in split.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_private(tmp_path / "part", split, names, tensors_hash(draft.state_dict()), {})
    again, _ = load_private(tmp_path / "part", draft, tensors_hash(draft.state_dict()))
    assert torch.equal(run(split, target), run(again, target))
    whole = sum(t.nbytes for t in split.state_dict().values())
    assert (tmp_path / "part" / "private.safetensors").stat().st_size < whole / 2


def test_every_parameter_has_exactly_one_group(draft):
    names = [n for n, _ in attach_low_rank(attach_private(draft, 8), 2).named_parameters()]
    assert {group_of(n) for n in names} == set(GROUPS) - {"embed"} | {LOW_RANK}
    for name in [n for n in names if group_of(n) != LOW_RANK]:
        assert sum(name.startswith(prefixes) for prefixes in GROUPS.values()) == 1, name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_its_groups_and_nothing_else(name, draft):
    ready, names = prepare(copy.deepcopy(draft), name, PrivateSize(16, 2))
    assert {n for n, p in ready.named_parameters() if p.requires_grad} == set(names)
    assert {group_of(n) for n in names} == set(METHODS[name].groups)
    assert trained_parameters(ready, name) == sum(p.numel() for p in ready.parameters() if p.requires_grad)


def test_full_trains_every_weight(draft):
    assert trainable_names(draft, "full") == [n for n, _ in draft.named_parameters()]


def test_unknown_methods_are_named():
    with pytest.raises(UserError, match="unknown method 'edda'.*eda\\+fc"):
        method("edda")


def test_a_draft_for_another_target_is_refused(draft, tiny_target):
    wide = Eagle3Config.from_dict({**draft.config.to_dict(), "target_hidden_size": 64, "taps": [2, 3, 9]})
    with pytest.raises(UserError, match="width 64.*layer 9"):
        check_fit(wide, tiny_target("llama"))


def test_the_vocabulary_map_round_trips(draft):
    assert draft.vocabulary().tolist() == list(range(0, 120, 2))
    assert draft.t2d.nonzero().squeeze(-1).tolist() == list(range(0, 120, 2))
    with pytest.raises(ValueError, match="ascending"):
        draft.set_vocabulary(torch.arange(59, -1, -1))


def test_rotary_positions_equal_transformers(tiny_target):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from redraft.drafts.layers import Rotary, rotate

    target = tiny_target("llama")
    positions = torch.tensor([0, 1, 7, 700])
    x = torch.randn(1, 4, 4, 8)
    rotary = Rotary(dict(target.config.rope_parameters), 8, 512)
    cosines, sines = target.backbone.rotary_emb(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x, x, cosines, sines)
    got = rotate(x[0].transpose(0, 1), *rotary(positions)).transpose(0, 1)
    torch.testing.assert_close(got, expected[0])
