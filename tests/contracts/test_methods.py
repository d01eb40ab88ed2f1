"""What every method must keep; a new method inherits these tests by being in ``METHODS``.

Shape legend: T tokens, D draft vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from redraft.artifact import tensors_hash
from redraft.drafts.base import Draft, fresh, is_private
from redraft.drafts.files import load_private, save_private
from redraft.drafts.groups import group_of, prepare, trained_parameters
from redraft.drafts.scaling import scale_change
from redraft.errors import UserError
from redraft.settings.training import METHODS, PrivateSize, mergeable
from redraft.target import Target
from redraft.training.optimizer import make_optimizers

SIZE = PrivateSize(width=16, rank=2)
# Every method as it is, and what the sizes can ask of those that have private parts.
CASES = {
    **{name: (name, SIZE) for name in METHODS},
    "lora on some layers": ("lora", replace(SIZE, alpha=4.0, on=("*_proj", "fc"))),
    "eda-moe, shared experts too": ("eda-moe", replace(SIZE, shared_experts=8)),
    "eda-moe, one of two": ("eda-moe", replace(SIZE, experts=2, active=1)),
    "eda-moe, one expert": ("eda-moe", replace(SIZE, experts=1, active=1)),
}


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain causal attention over [T, heads, width], written out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    mask = torch.ones(len(query), len(key), dtype=torch.bool).tril()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), value)


def logits(draft: Draft, target: Target, seed: int = 0) -> Tensor:
    """Logits [T, D] of a second draft step, so that a draft's own states have gone through it too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, target.vocab_size, (9,), generator=generator)
    taps = torch.randn(9, len(draft.config.taps) * target.hidden_size, generator=generator)
    embeds, positions = draft.embed(ids, target.embedding), torch.arange(9)
    attends = [causal] * draft.config.num_layers
    states = draft(embeds, draft.fuse(taps), positions, attends)
    return draft.logits(draft(embeds, draft.carry(states), positions + 1, attends))


def states(draft: Draft) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in draft.state_dict().items()}


def train(draft: Draft, target: Target, optimizer: str = "muon", steps: int = 3) -> None:
    """A few steps towards arbitrary labels, as the trainer takes them."""
    trained = [(n, p) for n, p in draft.named_parameters() if p.requires_grad]
    optimizers = make_optimizers(trained, optimizer, 0.0)
    labels = torch.arange(9) % draft.config.draft_vocab_size
    for step in range(steps):
        found = logits(draft, target, step)
        (torch.nn.functional.cross_entropy(found, labels) + draft.extra_loss()).backward()
        optimizers.step(1e-2)


@pytest.fixture
def target(tiny_target) -> Target:
    return tiny_target("llama")


@pytest.fixture(params=["eagle3", "eagle1"])
def draft(request, target) -> Draft:
    """An old draft of each family, with every optional tensor that methods can name."""
    old = fresh(request.param, target, range(0, 120, 2), seed=3)
    options = {"norm_before_fc": True} if request.param == "eagle3" else {}
    layers = {"num_layers": 2, "qk_norm": True, "attention_bias": True, "fc_bias": True}
    draft = type(old)(replace(old.config, **layers, **options)).bind(target)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            scale = 1.0 if name.endswith("norm.weight") else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return draft


@pytest.fixture(params=CASES)
def case(request) -> tuple[str, PrivateSize]:
    return CASES[request.param]


@pytest.fixture
def ready(case, draft, target) -> tuple[Draft, list[str]]:
    if case[0] == "head" and not hasattr(draft, "lm_head"):
        with pytest.raises(UserError, match="head, of which this draft has nothing"):
            prepare(copy.deepcopy(draft), *case)
        pytest.skip("the head is the target's")
    return prepare(copy.deepcopy(draft), *case, seed=1, target=target)


def test_no_bit_changes_before_the_first_step(case, ready, draft, target):
    with torch.no_grad():
        same = torch.equal(logits(ready[0], target), logits(draft, target))
    assert same != METHODS[case[0]].fresh


def test_the_trained_and_the_frozen_are_told_apart_by_their_groups(case, ready, draft):
    split, names = ready
    chosen = METHODS[case[0]]
    frozen = {n for n, p in split.named_parameters() if not p.requires_grad}
    assert not frozen & set(names) and frozen | set(names) == {n for n, _ in split.named_parameters()}
    groups = {n: group_of(split, n) for n, _ in split.named_parameters()}
    assert {groups[n] for n in names} <= set(chosen.groups) and not {groups[n] for n in frozen} & set(chosen.groups)
    assert bool(names) == bool(chosen.groups)
    assert trained_parameters(split, case[0]) == sum(p.numel() for p in split.parameters() if p.requires_grad)
    # what the method added is private, and is trained
    added = set(split.state_dict()) - set(draft.state_dict())
    assert all(map(is_private, added)) and added <= set(names)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_changes_exactly_what_is_trained(optimizer, ready, target):
    split, names = ready
    if not names:
        assert not any(p.requires_grad for p in split.parameters())
        return
    before = states(split)
    train(split, target, optimizer)
    after = split.state_dict()
    assert {name for name in after if not torch.equal(before[name], after[name])} == set(names)


def test_what_was_trained_is_a_file_of_its_own(case, ready, draft, target, tmp_path):
    split, names = ready
    if not names:
        pytest.skip("nothing is trained")
    train(split, target)
    split.requires_grad_(False)
    base_hash = tensors_hash(draft.state_dict())
    save_private(tmp_path / "part", split, names, base_hash, {"method": case[0]})
    again, meta = load_private(tmp_path / "part", draft, base_hash)
    again.bind(target)
    assert type(again) is type(split) and again.config == split.config and meta["method"] == case[0]
    assert tensors_hash(again.state_dict()) == tensors_hash(split.state_dict())
    assert torch.equal(logits(again, target), logits(split, target))


def test_a_trained_draft_is_one_dense_draft_or_says_that_it_cannot_be(case, ready, draft, target):
    split, names = ready
    if names:
        train(split, target, "adamw")
    split.requires_grad_(False)
    if not mergeable(*case):
        with pytest.raises(UserError, match=r"experts.*eda-moe.*cannot be merged or exported"):
            split.merged()
        return
    dense = split.merged()
    assert set(dense.state_dict()) == set(draft.state_dict()) and not any(map(is_private, dense.state_dict()))
    width = SIZE.width if METHODS[case[0]].private else 0
    assert dense.config == replace(draft.config, intermediate_size=draft.config.intermediate_size + width)
    expected = logits(split, target)
    # float32 rounds in proportion to the largest terms, not to the smallest sums
    atol = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits(dense, target), expected, atol=atol, rtol=0)
    if names:
        assert not torch.allclose(logits(dense, target), logits(draft, target), atol=1e-3)


def test_what_a_method_changes_can_be_put_in_by_halves(case, ready, draft, target):
    """From the old draft at 0 to the trained one at 1, every merged matrix on the line between the two."""
    split, names = ready
    if METHODS[case[0]].fresh:
        pytest.skip("a new draft was not trained from the old one")
    if names:
        train(split, target, "adamw")
    split.requires_grad_(False)
    if not mergeable(*case):
        with pytest.raises(UserError, match="cannot be merged"):
            scale_change(split, draft, 0.5)
        return
    none, half, whole = (scale_change(split, draft, scale) for scale in (0.0, 0.5, 1.0))
    torch.testing.assert_close(logits(none, target), logits(draft, target))
    torch.testing.assert_close(logits(whole, target), logits(split, target))
    before, between, after = (d.merged().state_dict() for d in (none, half, whole))
    for name, tensor in between.items():
        torch.testing.assert_close(tensor.float(), (before[name].float() + after[name].float()) / 2)


def test_a_method_says_what_it_is():
    for name, chosen in METHODS.items():
        assert chosen.about and len(chosen.about) < 100, name
        assert len(set(chosen.groups)) == len(chosen.groups)
        chosen.size(PrivateSize())  # its settings are fields of PrivateSize
