"""Long rows: an unroll in blocks has the numbers of one that is not divided, and keeps to what it may keep.

Shape legend: B rows, E key heads, G query heads a key head, A anchors, T positions, W head width, J draft steps.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from redraft.data.store import Row
from redraft.drafts.eagle.blocks import Plan, _blocks, unrolled
from redraft.drafts.eagle.unroll import Batch, collate, unroll
from redraft.drafts.eagle1 import fresh_eagle1
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.groups import prepare
from redraft.errors import UserError
from redraft.features import ComputedFeatures, FeatureSource, FeatureStore
from redraft.registries import LOSSES
from redraft.settings.sampler import Sampler
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.target import FINAL, Target

J, WORDS = 3, 120
# A limit below what the batch takes, and above what one anchor does.
SMALL = 0.0015
EXACT = [name for name, loss in LOSSES.items() if not getattr(loss, "sampled", False)]


@pytest.fixture(scope="module")
def target(tiny_target) -> Target:
    return tiny_target("llama", num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(4, 128, (80,), generator=generator).tolist() for _ in range(4)]
    pairs = enumerate(zip(texts, (9, 80, 14, 30), strict=True))
    return [Row(f"r{i}", text[:5], text[5:end], 0.0, 0, 1.0, 0, "length", "hash") for i, (text, end) in pairs]


@pytest.fixture(scope="module")
def store(target, rows, tmp_path_factory) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("blocks") / "features", {"target": "tiny"})
    store.build(target, rows)
    return store


def drafts(target: Target, kind: str, method: str = "full"):
    """A draft in float64 beside a target whose head is too, and a batch's features."""
    if kind == "eagle1":
        new = fresh_eagle1(target, seed=2)
    else:
        new = fresh_draft(target, range(WORDS), seed=2)
    if kind != "eagle1" and kind != "plain":
        changes = {"layers": {"num_layers": 2}, "window": {"num_layers": 2, "windows": (6, 9)}}[kind]
        torch.manual_seed(1)
        new = type(new)(replace(new.config, **changes), new.vocabulary())
    new, _ = prepare(new, method, PrivateSize(16, 4))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name.endswith(("outer", "private.down_proj.weight", "o_proj.weight")):
                parameter.normal_(std=0.2, generator=generator)
    return new


def features(kind: str, target: Target, store: FeatureStore) -> FeatureSource:
    """What a draft reads: EAGLE-1's the final state."""
    return ComputedFeatures(Target(target.model, taps=(FINAL,))) if kind == "eagle1" else store


def doubled(batch: Batch) -> Batch:
    return replace(batch, taps_N=batch.taps_N.double(), hidden_M=batch.hidden_M.double())


def gradients(loss: Tensor, draft) -> dict[str, Tensor]:
    trained = {n: p for n, p in draft.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {n: g for n, g in zip(trained, found, strict=True) if g is not None}


@pytest.fixture(scope="module")
def exact(target) -> SimpleNamespace:
    """What an objective reads of the target, in float64."""
    model = copy.deepcopy(target.model).double()
    return Target(model, taps=target.taps)


CASES = [("plain", "full"), ("plain", "lora"), ("plain", "eda-moe"), ("layers", "full"), ("window", "full")]


@pytest.mark.parametrize(("kind", "method"), [*CASES, ("eagle1", "full")])
def test_blocks_give_the_value_and_gradient_of_the_whole(kind, method, exact, target, rows, store) -> None:
    draft = drafts(target, kind, method).double().train()
    found = []
    for memory in (1.0, SMALL):
        config = TrainConfig(unroll=J, activation_memory=memory)
        objective = draft.objective(exact, config)
        batch = doubled(objective.collate(rows, features(kind, target, store)))
        divided = Plan.of(draft, batch, J, memory * 2**30) is not None
        assert divided == (memory == SMALL)
        loss = objective(batch)
        found.append((float(loss.detach()), gradients(loss, draft)))
    (value, wanted), (other, given) = found
    assert other == pytest.approx(value, rel=1e-6)
    assert wanted.keys() == given.keys() and max(float(g.abs().max()) for g in wanted.values()) > 1e-4
    for name, gradient in wanted.items():
        torch.testing.assert_close(given[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", EXACT)
def test_every_loss_goes_through_blocks(name, exact, target, rows, store) -> None:
    draft, found = drafts(target, "plain", "lora").double().train(), []
    for memory in (1.0, SMALL):
        objective = draft.objective(exact, TrainConfig(unroll=J, loss=name, activation_memory=memory))
        loss = objective(doubled(objective.collate(rows, store)))
        found.append(gradients(loss, draft))
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(found[1][parameter], gradient, atol=1e-6, rtol=1e-5, msg=parameter)


def test_blocks_under_bfloat16_autocast_agree_with_the_whole(target, rows, store) -> None:
    draft, found = drafts(target, "plain", "lora").train(), []
    for memory in (1.0, SMALL):
        objective = draft.objective(target, TrainConfig(unroll=J, activation_memory=memory))
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(objective.collate(rows, store))
        found.append(gradients(loss, draft))
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() < 0.03 * gradient.norm() + 1e-6, name


def test_what_fits_is_not_divided_and_has_the_bits_of_before(target, rows, store) -> None:
    draft = drafts(target, "plain").train()
    batch = collate(rows, store, J)
    assert Plan.of(draft, batch, J, 4 * 2**30) is None
    parts = draft, target.embedding, batch, J
    for ours, plain in zip(unrolled(*parts, None), unroll(*parts), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("size", [1, 4, 9, 30, 1000])
def test_blocks_hold_every_anchor_once_and_no_more_than_they_may(size, rows, store) -> None:
    batch = collate(rows, store, 1)
    parts = list(_blocks(batch, size))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(batch.anchor_M)))
    for part in parts:
        counts = batch.row_M[part].unique(return_counts=True)[1]
        assert len(counts) * int(counts.max()) <= size


def test_a_limit_that_holds_no_position_is_told_in_one_line(target, rows, store) -> None:
    objective = drafts(target, "plain").objective(target, TrainConfig(unroll=J, activation_memory=1e-6))
    with pytest.raises(
        UserError, match="activation_memory of 1e-06 GiB does not hold one position .* give more"
    ) as found:
        objective(objective.collate(rows, store))
    assert "\n" not in str(found.value)


# -- walks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["plain", "layers", "window"])
def test_a_walk_in_blocks_is_the_walk_of_the_whole(kind, target, rows, store, monkeypatch) -> None:
    draft = drafts(target, kind)
    sampler, found = Sampler(0.7), []
    for memory in (2**32, 2**18):
        walk = draft.walk(target)
        monkeypatch.setattr(type(walk), "memory", memory)
        batch = collate(rows, store, J)
        assert (Plan.of(draft, batch, J, memory) is None) == (memory == 2**32)
        runs = {row.key: part for row, part in walk.runs(rows, store, J)}
        chances = {row.key: part for row, part in walk.chances(rows, store, J, sampler)}
        found.append((runs, chances, dict((row.key, alpha) for row, alpha in walk.alphas(rows, store))))
    (runs, chances, alphas), (other_runs, other_chances, other_alphas) = found
    assert runs == other_runs
    assert max(float(part.max()) for part in chances.values()) > 0.1
    for key in runs:
        torch.testing.assert_close(other_chances[key], chances[key], atol=1e-5, rtol=1e-4)
        assert other_alphas[key] == pytest.approx(alphas[key], rel=1e-4)
