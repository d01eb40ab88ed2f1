"""Packed weights change how fast a product is, and nothing else."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from redraft import arithmetic as module
from redraft.arithmetic import PackedForward, prepack
from redraft.decode.engine import ChainDecoder
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.layers import Linear

TYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def stand_in_pack(weight: torch.Tensor) -> torch.Tensor:
    return weight.clone()


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All layers are packed, whatever the processor: where it takes a type, by its own kernel, else by a stand-in."""
    monkeypatch.setattr(module, "LEAST_NUMBERS", 0)
    module.takes.cache_clear()
    if not all(map(module.takes, TYPES)):
        monkeypatch.setattr(module, "pack", stand_in_pack)
        monkeypatch.setattr(module, "product", nn.functional.linear)
        module.takes.cache_clear()
    yield
    module.takes.cache_clear()


def layer(dtype: torch.dtype = torch.float32, bias: bool = True, inputs: int = 48, outputs: int = 80) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (5, 48), (1, 4, 48), (3, 700, 48)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_product_is_that_of_the_layer(dtype, bias, shape):
    plain = layer(dtype, bias)
    packed = prepack(copy.deepcopy(plain))
    x = rows(*shape, dtype=dtype)
    with torch.no_grad():
        found = packed(x)
        assert torch.allclose(found, plain(x), atol=TYPES[dtype])
    assert packed.forward.packed is not None, "the packed weight was not used"
    assert found.dtype == dtype and found.shape == (*shape[:-1], 80)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.weight.add_(1),
        lambda found: found.weight.mul_(2),
        lambda found: found.load_state_dict({name: -t for name, t in found.state_dict().items()}),
        lambda found: setattr(found, "weight", nn.Parameter(found.weight * 3, requires_grad=False)),
        lambda found: found.to(torch.bfloat16).to(torch.float32),
    ],
    ids=["added to", "multiplied", "loaded", "replaced", "cast there and back"],
)
def test_a_weight_that_changed_is_packed_anew(change):
    packed = prepack(layer())
    x = rows(4, 48)
    with torch.no_grad():
        before = packed(x)
        change(packed)
        after = packed(x)
        assert torch.allclose(after, nn.Linear.forward(packed, x), atol=1e-5)
    assert not torch.equal(before, after)


def test_an_optimiser_step_is_seen():
    packed = prepack(layer().requires_grad_(True))
    x = rows(4, 48)
    with torch.no_grad():
        packed(x)
    packed(x).square().sum().backward()
    torch.optim.SGD(packed.parameters(), 0.1).step()
    with torch.no_grad():
        assert torch.allclose(packed(x), nn.Linear.forward(packed, x), atol=1e-5)


def test_where_a_gradient_is_wanted_the_layer_is_its_own():
    plain, x = layer().requires_grad_(True), rows(4, 48).requires_grad_(True)
    packed = prepack(copy.deepcopy(plain))
    for one in (plain, packed):
        one(x).square().sum().backward()
    assert torch.equal(packed.weight.grad, plain.weight.grad)
    assert torch.equal(packed(x), plain(x)) and packed.forward.packed is None


@pytest.mark.parametrize("case", ["other type", "autocast", "not contiguous", "no rows", "low rank"])
def test_what_the_kernel_does_not_take_goes_the_old_way(case):
    plain = layer()
    if case == "low rank":
        plain = Linear(48, 80)
        plain.attach_low_rank(2)
    packed, x = prepack(copy.deepcopy(plain)), rows(4, 48)
    if case == "other type":
        plain, packed, x = plain.double(), packed.double(), x.double()
    if case == "not contiguous":
        x = rows(48, 4).T
    if case == "no rows":
        x = rows(0, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(packed(x), plain(x))
    assert packed.forward.packed is None


def test_copies_and_files_hold_no_packed_weight():
    packed = prepack(nn.Sequential(layer(), layer(inputs=80)))
    x = rows(4, 48)
    with torch.no_grad():
        expected = packed(x)
        twin = copy.deepcopy(packed)
        assert all(isinstance(one.forward, PackedForward) and one.forward.layer() is one for one in twin)
        assert all(one.forward.packed is None for one in twin)
        twin[0].weight.zero_()
        assert torch.equal(packed(x), expected), "a copy shares nothing"
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    assert set(packed.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_dropped_module_is_freed_at_once():
    packed = prepack(layer())
    gone = weakref.ref(packed)
    del packed
    assert gone() is None


def test_large_modules_are_left_alone(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 4 * 48 * 80 - 1)
    assert "forward" not in prepack(layer()).__dict__


def test_small_layers_are_left_alone(monkeypatch):
    monkeypatch.setattr(module, "LEAST_NUMBERS", 48 * 80)
    packed = prepack(nn.Sequential(layer(), layer(outputs=79)))
    assert ["forward" in one.__dict__ for one in packed] == [True, False]


def test_layers_on_another_device_are_left_alone():
    assert "forward" not in prepack(layer().to("meta")).__dict__


# -- processors that do not take a type ------------------------------------------------------------------------------
def refuses(*given: object) -> torch.Tensor:
    raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq")


def off_by_a_tenth(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return 1.1 * nn.functional.linear(x, packed, bias)


def no_bias(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return nn.functional.linear(x, packed)


PLANTED = {
    "no reordering": (refuses, nn.functional.linear),
    "no product": (stand_in_pack, refuses),
    "wrong numbers": (stand_in_pack, off_by_a_tenth),
    "bias forgotten": (stand_in_pack, no_bias),
    "not a number": (stand_in_pack, lambda x, packed, bias: nn.functional.linear(x, packed, bias) * torch.nan),
    "another type": (stand_in_pack, lambda x, packed, bias: nn.functional.linear(x, packed, bias).double()),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("planted", PLANTED)
def test_a_processor_that_refuses_or_errs_gets_plain_products(planted, dtype, monkeypatch):
    for name, kernel in zip(("pack", "product"), PLANTED[planted], strict=True):
        monkeypatch.setattr(module, name, kernel)
    module.takes.cache_clear()
    plain, x = layer(dtype), rows(4, 48, dtype=dtype)
    packed = prepack(copy.deepcopy(plain))
    with torch.no_grad():
        assert torch.equal(packed(x), plain(x)) and torch.equal(packed(x[:1]), plain(x[:1]))
    assert not module.takes(dtype) and packed.forward.packed is None


@pytest.mark.parametrize("operator", ["_reorder_linear_weight", "_linear_pointwise"])
def test_what_torch_itself_raises_ends_in_plain_products(operator, monkeypatch):
    """The operators as torch offers them, each refusing, before the trial and, for a shape of its own, after it."""
    monkeypatch.undo()
    monkeypatch.setattr(module, "LEAST_NUMBERS", 0)
    plain, x = layer(), rows(4, 48)
    early, late = prepack(copy.deepcopy(plain)), prepack(copy.deepcopy(plain))
    tried = module.takes(torch.float32)
    monkeypatch.setattr(torch.ops.mkldnn, operator, refuses, raising=False)
    with torch.no_grad():
        assert torch.equal(late(x), plain(x)) and late.forward.packed is None and late.forward.refused == tried
        module.takes.cache_clear()
        assert torch.equal(early(x), plain(x)) and not early.forward.refused and not module.takes(torch.float32)


def test_the_trial_is_held_once_a_process(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "pack", lambda weight: calls.append(weight.dtype) or weight.clone())
    monkeypatch.setattr(module, "product", nn.functional.linear)
    module.takes.cache_clear()
    assert all(module.takes(dtype) for dtype in [*TYPES, *TYPES]) and calls == list(TYPES)
    assert not module.takes(torch.float64) and len(calls) == 2


def test_targets_and_decoding_drafts_are_packed(tiny_target):
    target = tiny_target("llama")
    decoder = ChainDecoder(target, fresh_draft(target, range(64)), 2)
    decoder.generate([1, 2, 3], 4)
    for linear in (target.head, target.backbone.layers[0].mlp.up_proj, decoder.draft.lm_head, decoder.draft.fc):
        assert linear.forward.packed is not None
    assert prepack(target.model) is target.model, "packing twice changes nothing"
