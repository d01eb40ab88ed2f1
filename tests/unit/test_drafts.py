"""Shared and private experts, parameter groups, and the Eagle3 draft's own properties."""

from __future__ import annotations

import copy

import pytest
import torch

from redraft.artifact import load_private, save_private, tensors_hash
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft, check_fit, fresh_draft
from redraft.drafts.experts import attach_private, attach_rows, frequent_ids, is_private, merge_private
from redraft.drafts.groups import (
    GROUPS,
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

RESPONSES = [[0, 2, 2, 4, 4, 4, 7], [4, 118, 118, 1, 2]]


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


def test_attaching_private_rows_changes_no_bit_and_merging_them_none_either(draft, tiny_target):
    target, ids = tiny_target("llama"), torch.tensor([0, 7, 31])
    split = attach_rows(draft, ids)
    assert torch.equal(run(draft, target), run(split, target))
    torch.nn.init.normal_(split.lm_head.private.weight, std=0.3)
    moved = (run(draft, target) != run(split, target)).any(0).nonzero().squeeze(-1)
    assert torch.equal(moved, ids)
    merged = merge_private(split)
    assert not any(map(is_private, merged.state_dict())) and merged.config == draft.config
    assert torch.equal(run(split, target), run(merged, target))


def test_private_rows_alone_learn(draft, tiny_target):
    ready, names = prepare(draft, "eda+fc+rows", PrivateSize(8, 3), RESPONSES)
    embeds, taps = torch.randn(5, 32), torch.randn(5, 96)
    ready.logits(ready(embeds, ready.fuse(taps), torch.arange(5), causal)).square().sum().backward()
    assert ready.lm_head.weight.grad is None and "lm_head.private.weight" in names
    assert ready.lm_head.private.weight.grad.abs().sum() > 0


def test_private_rows_are_those_of_the_commonest_tokens_that_the_draft_can_say(draft):
    # target ids 4, 2, 118 are draft ids 2, 1, 59; ids 1 and 7 are odd, which this draft cannot say
    assert frequent_ids(draft, RESPONSES, 3).tolist() == [1, 2, 59]
    assert frequent_ids(draft, RESPONSES, 99).tolist() == [0, 1, 2, 59]


def test_a_second_private_part_is_refused(draft):
    with pytest.raises(ValueError, match="merge it first"):
        attach_private(attach_private(draft, 8), 8)
    with pytest.raises(ValueError, match="merge them first"):
        attach_rows(attach_rows(draft, torch.tensor([3])), torch.tensor([4]))
    with pytest.raises(ValueError, match="at least one"):
        attach_rows(draft, torch.tensor([], dtype=torch.long))


@pytest.mark.parametrize("name", ["eda+fc", "eda+fc+rows"])
def test_a_private_part_alone_is_saved_and_put_over_the_shared_draft(name, draft, tiny_target, tmp_path):
    target = tiny_target("llama")
    split, names = prepare(draft, name, PrivateSize(24, 3), RESPONSES)
    torch.nn.init.normal_(split.midlayer.mlp.private.down_proj.weight, std=0.3)
    torch.nn.init.normal_(split.fc.weight, std=0.3)
    if name == "eda+fc+rows":
        torch.nn.init.normal_(split.lm_head.private.weight, std=0.3)
        names.append("lm_head.private.rows")
    save_private(tmp_path / "part", split, names, tensors_hash(draft.state_dict()), {})
    again, _ = load_private(tmp_path / "part", draft, tensors_hash(draft.state_dict()))
    assert torch.equal(run(split, target), run(again, target))
    whole = sum(t.nbytes for t in split.state_dict().values())
    assert (tmp_path / "part" / "private.safetensors").stat().st_size < whole / 2


def test_every_parameter_has_exactly_one_group(draft):
    names = [n for n, _ in attach_rows(attach_private(draft, 8), torch.tensor([1, 4])).named_parameters()]
    assert {group_of(n) for n in names} == set(GROUPS) - {"embed"}
    for name in names:
        assert sum(name.startswith(prefixes) for prefixes in GROUPS.values()) == 1, name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_its_groups_and_nothing_else(name, draft):
    ready, names = prepare(copy.deepcopy(draft), name, PrivateSize(16, 5), RESPONSES)
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
