"""Shared and private experts, parameter groups, and the Eagle3 draft's own properties."""

from __future__ import annotations

import copy
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch

from redraft.drafts.base import is_private
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft, fresh_draft
from redraft.drafts.groups import (
    attach_low_rank,
    attach_private,
    group_of,
    match_linears,
    prepare,
    trainable_names,
    trained_parameters,
)
from redraft.drafts.scaling import scale_change
from redraft.errors import UserError
from redraft.settings.training import LOW_RANK, RANK_STEP, SHARE, WIDTH_STEP, PrivateSize, method
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
        return draft.logits(draft(embeds, draft.fuse(taps), torch.arange(9), [causal] * draft.config.num_layers))


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
    merged = split.merged()
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
    merged = split.merged()
    assert not any(map(is_private, merged.state_dict()))
    assert {n.split(".low_rank")[0] for n in split.state_dict() if "low_rank" in n} == set(on or draft.linears())
    assert not torch.allclose(run(draft, target), run(split, target), atol=1e-3)
    torch.testing.assert_close(run(split, target), run(merged, target), atol=1e-5, rtol=1e-5)


def test_patterns_choose_the_layers_of_low_rank_updates(draft):
    everything = draft.linears()
    projections = [name for name in everything if name.endswith("_proj")]
    assert match_linears(draft, ()) == everything
    assert match_linears(draft, ["*_proj"]) == projections and len(projections) == 7
    assert match_linears(draft, ["lm_head", "fc"]) == ["fc", "lm_head"]
    assert match_linears(draft, ["q_proj", "midlayer.mlp.*"]) == [n for n in projections if "mlp" in n or "q_p" in n]
    # the router and the experts of a private part are no place for updates
    assert match_linears(attach_private(draft, 8, experts=2), ["*"]) == everything


def test_updates_with_an_alpha_are_those_of_peft(draft, tiny_target):
    peft = pytest.importorskip("peft")
    target = tiny_target("llama")
    ours, names = prepare(copy.deepcopy(draft), "lora-peer", PrivateSize(rank=64))
    assert len(names) == 14 and all(".low_rank." in name and "_proj." in name for name in names)
    layers = [name for name, _ in ours.named_modules() if name.endswith("_proj")]
    config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=layers)
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(draft))
    for name in layers:
        update, layer = ours.get_submodule(name).low_rank, theirs.get_submodule(name)
        inner = layer.lora_A["default"].weight
        assert update.inner.shape == inner.shape == (8, update.inner.shape[1])
        # peft draws uniformly within 1 / sqrt(inputs), and so do we
        for drawn in (update.inner, inner):
            assert 0.9 < float(drawn.detach().abs().max()) * drawn.shape[1] ** 0.5 <= 1
        torch.nn.init.normal_(update.outer, std=0.3)
        with torch.no_grad():
            inner.copy_(update.inner)
            layer.lora_B["default"].weight.copy_(update.outer)
    assert torch.equal(run(ours, target), run(theirs, target))
    assert not torch.allclose(run(ours, target), run(draft, target), atol=1e-2)
    merged = ours.merged()
    for name in layers:
        layer = theirs.get_submodule(name)
        layer.merge()
        torch.testing.assert_close(merged.get_submodule(name).weight, layer.base_layer.weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_without_an_alpha_the_scale_does_not_hang_on_the_rank(rank, draft):
    update = attach_low_rank(draft, rank, ["fc"]).fc.low_rank
    assert update.scale == 1.0
    assert float(update.inner.detach().std()) * update.inner.shape[1] ** 0.5 == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("inner", [64, 1024])
@pytest.mark.parametrize("experts", [2, 3, 11])
@pytest.mark.parametrize("name", ["eda", "eda+fc", "eda-moe", "lora"])
def test_a_part_of_no_given_size_makes_what_is_trained_a_fifth_of_the_draft(name, experts, inner, tiny_target):
    """Whatever the draft's shape, it is the largest multiple of a step that keeps to the share."""
    target = tiny_target("llama", hidden_size=128, intermediate_size=inner)
    draft = fresh_draft(target, range(100), seed=1)
    size = PrivateSize(experts=experts, active=2)
    ready, names = prepare(copy.deepcopy(draft), name, size)
    sizes = {n: p.numel() for n, p in ready.named_parameters() if ".router." not in n}
    part, trained = sum(sizes[n] for n in sizes if is_private(n)), sum(sizes[n] for n in names if n in sizes)
    count = ready.config.low_rank if name == "lora" else ready.config.private_width
    step = {"lora": RANK_STEP, "eda-moe": experts * round(WIDTH_STEP / experts)}.get(name, WIDTH_STEP)
    share = SHARE * trained_parameters(draft, "full")
    if count == 1:  # nothing smaller can be attached
        return
    assert trained <= share < trained + part * step / count
    again, _ = prepare(ready, name, size)
    assert again.config == ready.config, "a part that is there is trained on, whatever its size"


def test_updates_of_one_small_matrix_have_no_more_than_its_rank(draft):
    ready, _ = prepare(copy.deepcopy(draft), "lora", PrivateSize(on=("*.k_proj",)))
    assert ready.config.low_rank == min(draft.midlayer.self_attn.k_proj.weight.shape)


@pytest.mark.parametrize(
    ("attach", "complaint"),
    [
        (lambda d: attach_low_rank(d, 0), "rank of the low-rank updates is 0"),
        (lambda d: attach_low_rank(d, 2, alpha=0.0), "alpha of the low-rank updates is 0"),
        (lambda d: attach_low_rank(d, 2, ["fc", "norm"]), "pattern 'norm'; there are: fc, .*lm_head"),
        (lambda d: attach_low_rank(attach_low_rank(d, 2), 2), "merge them first"),
        (lambda d: attach_private(d, 0), "width of the private expert is 0"),
        (lambda d: attach_private(d, -8), "width of the private expert is -8"),
        (lambda d: attach_private(d, 8, experts=2, active=3), "3 active of 2 private experts"),
        (lambda d: attach_private(d, 8, experts=0), "1 active of 0 private experts"),
        (lambda d: attach_private(d, 8, experts=4, active=0), "0 active of 4 private experts"),
        (lambda d: attach_private(d, 8, experts=3), "width of 8 cannot be divided among 3 private experts"),
        (lambda d: attach_private(d, 8, shared_experts=5), "width of 64 cannot be divided among 5 shared experts"),
        (lambda d: attach_private(d, 8, shared_experts=4, shared_active=5), "5 active of 4 shared experts"),
        (lambda d: attach_private(d, 8, experts=2, balance=-1), "load-balancing term is -1"),
        (lambda d: attach_private(attach_private(d, 8), 8), "merge them first"),
        (lambda d: prepare(d, "lora", PrivateSize(rank=0)), "rank must be 1 or more"),
        (lambda d: prepare(d, "lora", PrivateSize(on=("*_prj",))), r"pattern '\*_prj'"),
        (lambda d: prepare(d, "eda", PrivateSize(width=0)), "width must be 1 or more"),
        (lambda d: prepare(d, "eda-moe", PrivateSize(8, experts=2, active=3)), "3 active of 2"),
        (lambda d: prepare(d, "scratch", PrivateSize()), "needs the target"),
        (lambda d: prepare(attach_private(d, 8), "eda", PrivateSize(16)), "private_width 8.*merge it first"),
        (lambda d: prepare(attach_low_rank(d, 4), "lora-peer", PrivateSize()), "rank 4 and alpha None"),
        (lambda d: prepare(torch.nn.Sequential(), "fc", PrivateSize()), "fc, of which this draft has nothing"),
    ],
)
def test_sizes_that_cannot_be_are_one_clear_line(attach, complaint, draft):
    with pytest.raises(UserError, match=complaint) as caught:
        attach(draft)
    assert "\n" not in str(caught.value)


def test_private_parts_of_the_size_asked_for_are_trained_further(draft):
    for name in ("eda", "eda-moe", "lora", "lora-peer"):
        once, names = prepare(copy.deepcopy(draft), name, PrivateSize(16, 2))
        again, same = prepare(once, name, PrivateSize(16, 2))
        assert again is once and same == names


def test_every_parameter_has_exactly_one_group(draft):
    shape = replace(draft.config, norm_before_fc=True, attention_bias=True, own_embedding=True)
    split = attach_low_rank(attach_private(Eagle3Draft(shape), 8, experts=2, shared_experts=4), 2)
    names = [n for n, _ in split.named_parameters()]
    groups = split.GROUPS.values()
    assert {group_of(split, n) for n in names} == {*split.GROUPS, LOW_RANK}
    for name in [n for n in names if group_of(split, n) != LOW_RANK]:
        assert sum(any(fnmatchcase(name, pattern) for pattern in patterns) for patterns in groups) == 1, name
    with pytest.raises(KeyError, match="midlayer.mlp.fresh"):
        group_of(split, "midlayer.mlp.fresh.weight")


def test_full_trains_every_weight(draft):
    assert trainable_names(draft, "full") == [n for n, _ in draft.named_parameters()]


def test_scratch_is_a_new_draft_of_the_same_shape(draft, tiny_target):
    target = tiny_target("llama")
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_()
    new, names = prepare(copy.deepcopy(draft), "scratch", PrivateSize(), 5, target=target)
    assert new.config == draft.config and torch.equal(new.vocabulary(), draft.vocabulary())
    assert names == [n for n, _ in draft.named_parameters()]
    expected = fresh_draft(target, draft.vocabulary().tolist(), 5).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in new.state_dict().items())
    merged = prepare(attach_private(draft, 16), "scratch", PrivateSize(), target=target)[0].config
    assert merged.intermediate_size == draft.config.intermediate_size + 16 and not merged.private_width
    with pytest.raises(UserError, match="does not fit the target"):
        prepare(draft, "scratch", PrivateSize(), target=tiny_target("llama", hidden_size=16))


def test_scratch_keeps_the_options_of_the_shape_and_a_table_of_another_width(draft, tiny_target):
    options = {"hidden_size": 24, "head_dim": 6, "own_embedding": True, "attention_bias": True, "fc_norm": True}
    old = Eagle3Draft(replace(draft.config, **options), draft.vocabulary())
    new = old.restarted(tiny_target("llama"), seed=1)
    assert new.config == old.config and torch.equal(new.embed_tokens.weight, old.embed_tokens.weight)
    assert not any(bool(p.any()) for n, p in new.named_parameters() if n.endswith(".bias"))
    again = old.restarted(tiny_target("llama"), seed=1).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in new.state_dict().items())
    assert not torch.equal(new.fc.weight, old.fc.weight)


def test_unknown_methods_are_named():
    with pytest.raises(UserError, match="unknown method 'edda'.*eda\\+fc"):
        method("edda")


def test_a_draft_for_another_target_is_refused(draft, tiny_target):
    wide = Eagle3Config.from_dict({**draft.config.to_dict(), "target_hidden_size": 64, "taps": [2, 3, 9]})
    with pytest.raises(UserError, match="width 64.*layer 9"):
        wide.check_fit(tiny_target("llama"))


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


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_do_not_hang_on_what_was_asked_before(kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from redraft.drafts.layers import Rotary

    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [9.0] * 4,
            "original_max_position_embeddings": 600,
        }
    positions = torch.arange(600)
    rotary = Rotary(rope, 8, 600)
    before = rotary(positions[:9])[0]
    rotary(positions)  # the table grows to twice as many
    config = LlamaConfig(
        head_dim=8, hidden_size=8, num_attention_heads=1, max_position_embeddings=600, rope_parameters=dict(rope)
    )
    own = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    assert torch.equal(rotary(positions[:9])[0], before)
    for ours, theirs in zip(rotary(positions), own, strict=True):
        torch.testing.assert_close(ours, theirs[0])


# -- scaling ---------------------------------------------------------------------------------------------------------
def test_scaled_head_rows_go_by_their_tokens(draft, tiny_target):
    """A vocabulary that was refreshed before training: shared tokens on the line, new ones as they are."""
    other = fresh_draft(tiny_target("llama"), [*range(0, 100, 2), *range(1, 21, 2)], seed=4)
    half = scale_change(other, draft, 0.5)
    old, new = draft.vocabulary().tolist(), other.vocabulary().tolist()
    assert half.vocabulary().tolist() == new != old
    for row, token in enumerate(new):
        expected = other.lm_head.weight[row]
        if token in old:
            expected = (expected + draft.lm_head.weight[old.index(token)]) / 2
        torch.testing.assert_close(half.lm_head.weight[row], expected)
    assert sum(token not in old for token in new) == 10


@pytest.mark.parametrize("scale", [-0.1, float("inf"), float("nan")])
def test_a_scale_that_cannot_be_is_one_clear_line(scale, draft):
    with pytest.raises(UserError, match="the scale is .*; give 1 for the whole change"):
        scale_change(draft, draft, scale)


def test_only_a_draft_of_the_same_shape_can_be_drawn_back_to(draft, tiny_target):
    with pytest.raises(UserError, match=r"is \[.*\] and in the base draft \["):
        scale_change(draft, fresh_draft(tiny_target("llama", intermediate_size=96), range(0, 120, 2)), 0.5)
    with pytest.raises(UserError, match="base draft has no"):
        scale_change(draft, torch.nn.Linear(2, 2), 0.5)
