"""Long rows: an unroll in blocks has the numbers of one that is not divided, and keeps to what it may keep.

Shape legend: B rows, E key heads, G query heads a key head, A anchors, T positions, W head width, J draft steps.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from redraft.data.store import Row
from redraft.drafts.eagle import flex
from redraft.drafts.eagle.attention import _ByChunks
from redraft.drafts.eagle.blocks import Plan, _blocks, unrolled
from redraft.drafts.eagle.unroll import Batch, collate, unroll
from redraft.drafts.eagle1 import fresh_eagle1
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.groups import prepare
from redraft.drafts.standalone.shapes import fresh_standalone
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
        batch = doubled(objective.collate(rows[:2], store))
        assert (Plan.of(draft, batch, J, memory * 2**30) is None) == (memory == 1.0)
        loss = objective(batch)
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


# -- attention ---------------------------------------------------------------------------------------------------------
def attended(own: int, window: int = 0, rows: int = 2) -> tuple:
    """Random queries [B, E, G, A, W] in float64, keys and values [B, E, T, W], what they see, and own pairs."""
    generator = torch.Generator().manual_seed(own)
    shapes = [(rows, 2, 3, 7, 4), (rows, 2, 40, 4), (rows, 2, 40, 4), *[(rows, 2, 7, 4)] * (2 * own)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    last_BA = torch.tensor([[0, 3, 4, 20, 33, 38, 39], [5, 6, 7, 8, 9, 10, 11]])[:rows]
    first_BA = last_BA - window + 1 if window else torch.zeros_like(last_BA)
    return made, (*made[:3], first_BA, last_BA), list(zip(made[3::2], made[4::2], strict=True))


@pytest.mark.parametrize("chunk", [1, 6, 100])
@pytest.mark.parametrize(("own", "window"), [(0, 0), (2, 0), (1, 5)])
def test_chunks_of_keys_give_the_values_and_gradients_of_all_scores(chunk, own, window) -> None:
    made, parts, pairs = attended(own, window)
    expected = flex.attend_all(made, flex.plain(*parts, pairs))
    found = flex.attend_all(made, _ByChunks.apply(*parts, chunk, *made[3:]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("own", "window"), [(0, 0), (2, 0), (1, 5)])
def test_flex_attention_sees_what_plain_attention_sees(own, window) -> None:
    """The mask, key by key, and the values where torch has the forward pass of it, as on a CPU."""
    _, parts, pairs = attended(own, window)
    low = [x.detach().float() if x.is_floating_point() else x for x in parts]
    with torch.no_grad():
        found = flex.flex(*low, [tuple(x.detach().float() for x in pair) for pair in pairs], flex_attention)
        torch.testing.assert_close(found.double(), flex.plain(*parts, pairs), atol=1e-5, rtol=1e-4)
    rows, most, length = 2, 7, 40
    seen = create_mask(flex.sees_of(*parts[3:], length), rows, 1, most, length + own * most, device="cpu")
    for row in range(rows):
        for anchor in range(most):
            first, last = int(parts[3][row, anchor]), int(parts[4][row, anchor])
            wanted = {*range(max(0, first), last + 1), *(length + i * most + anchor for i in range(own))}
            assert set(seen[row, 0, anchor].nonzero().flatten().tolist()) == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no backward pass of flex attention on a CPU")
def test_flex_attention_gives_the_gradients_of_plain_attention_on_cuda() -> None:
    assert flex.usable(torch.device("cuda"), torch.bfloat16, 128)


def test_a_kernel_that_is_not_plain_attention_is_not_used(monkeypatch) -> None:
    """Nor one that does not compile: the trial says so, and chunks of keys do it."""
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(flex, "compiled", lambda: None)
    right = lambda *parts, attention: flex.plain(*parts)  # noqa: E731
    wrong = lambda *parts, attention: flex.plain(*parts) * 1.1  # noqa: E731
    for made, usable in ((right, True), (wrong, False), (lambda *parts, attention: 1 / 0, False)):
        flex.usable.cache_clear()
        monkeypatch.setattr(flex, "flex", made)
        assert flex.usable(torch.device("cpu"), torch.float32, 8) == usable
    flex.usable.cache_clear()


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            self.size = max(self.size, x.numel() if torch.is_tensor(x) else 0)
        return result


def test_no_tensor_grows_with_anchors_times_tokens(target) -> None:
    """A row twice as long has tensors twice as large at most, where scores would be four times."""
    draft, largest = drafts(target, "plain", "lora").train(), []
    for length in (400, 800):
        row = Row("r", [5, 6], [7 + i % 90 for i in range(length)], 0.0, 0, 1.0, 0, "length", "hash")
        source = SimpleNamespace(get=lambda row, n=length: (torch.randn(n, 96), torch.randn(n - 1, 32)))
        objective = draft.objective(target, TrainConfig(unroll=J, activation_memory=0.02))
        batch = objective.collate([row], source)
        with Largest() as seen:
            objective(batch).backward()
        largest.append(seen.size)
    assert largest[1] <= 2.1 * largest[0]


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


# -- standalone drafts -------------------------------------------------------------------------------------------------
def test_a_standalone_draft_makes_its_layers_states_again_where_rows_are_long(target, rows, store) -> None:
    draft, found, kept = fresh_standalone(target, layers=[0, 1]).train(), [], []
    for memory in (1.0, 1e-6):
        objective = draft.objective(target, TrainConfig(activation_memory=memory))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.numel()) or x, lambda x: x):
            loss = objective(objective.collate(rows, store))
        kept.append(sum(saved))
        found.append(gradients(loss, draft))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in draft.model.modules())
    assert kept[1] < kept[0] / 2
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-7, rtol=1e-5, msg=name)
