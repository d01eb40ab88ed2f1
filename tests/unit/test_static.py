"""Static-shape steps give what dynamic ones give, on the same shapes at every length, without asking the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from redraft import graphs
from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.decode.static import StaticCache, StaticChainDecoder, StaticTarget
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.errors import UserError
from redraft.graphs import Recorded, graphs_available
from redraft.settings.sampler import Sampler
from redraft.target import Target

WIDTHS = (1, 4, 6)


def ids(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, 128, (1, count), generator=torch.Generator().manual_seed(seed))


def make(target: Target) -> Eagle3Draft:
    return fresh_draft(target, list(range(120)), seed=1)


class Shapes(TorchDispatchMode):
    """Every operation with the shapes of its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        self.seen.append((str(func), tuple(tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor))))
        return result

    def asks_the_device(self) -> list[str]:
        """Operations that wait for a number (``resolve_conj`` is what a ``tolist`` shows of itself)."""
        asking = ("item", "_local_scalar_dense", "nonzero", "masked_select", "unique", "resolve_conj")
        return [name for name, _ in self.seen if any(word in name for word in asking)]


def operations(run: Callable[[], Any]) -> Shapes:
    with torch.inference_mode(), Shapes() as shapes:
        run()
    return shapes


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("length", [1, 9, 30])
def test_a_static_step_equals_a_dynamic_one(length, architecture, tiny_target):
    """States, taps and cache contents of every width and of a padded one, each after a roll-back."""
    target = tiny_target(architecture, num_hidden_layers=3, taps=(1, 2, 3))
    quick = StaticTarget(target, WIDTHS)
    cache, buffers = target.new_cache(48), quick.new_cache(48)
    prompt = ids(length)
    target.forward(prompt, cache)
    quick.forward(prompt, buffers)
    for tokens in (6, 1, 4, 5, 2, 1, 6):
        new = ids(tokens, seed=tokens)
        expected, got = target.forward(new, cache), quick.forward(new, buffers)
        torch.testing.assert_close(got.hidden_BTH, expected.hidden_BTH, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(got.taps_BTKH, expected.taps_BTKH, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            quick.logits(got.hidden_BTH), target.logits(expected.hidden_BTH), atol=2e-4, rtol=1e-4
        )
        assert cache.length == buffers.length
        for one, two in zip(cache.layers, buffers.layers, strict=True):
            end = cache.length
            torch.testing.assert_close(two.keys[:, :, :end], one.keys[:, :, :end], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(two.values[:, :, :end], one.values[:, :, :end], atol=2e-5, rtol=1e-4)
        cache.rollback(cache.length - tokens // 2)
        buffers.rollback(buffers.length - tokens // 2)
    assert {width for width, _ in quick.steps} == set(WIDTHS)


def test_a_masked_step_is_a_dynamic_one(tiny_target):
    """A small tree: two children of the root, then a child of the first; and compaction afterwards."""
    target = tiny_target("llama")
    quick = StaticTarget(target, (6,))
    cache, buffers = target.new_cache(24), quick.new_cache(24)
    target.forward(ids(7), cache)
    quick.forward(ids(7), buffers)
    block = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    mask = torch.cat([torch.ones(4, 7, dtype=torch.bool), block], 1)[None, None]
    positions = torch.tensor([[7, 8, 8, 9]])
    expected, got = (t.forward(ids(4), c, positions, mask) for t, c in ((target, cache), (quick, buffers)))
    torch.testing.assert_close(got.hidden_BTH, expected.hidden_BTH, atol=2e-5, rtol=1e-4)
    with torch.inference_mode():
        cache.compact(7, [0, 2])
        buffers.compact(7, [0, 2])
    expected, got = target.forward(ids(3), cache), quick.forward(ids(3), buffers)
    torch.testing.assert_close(got.hidden_BTH, expected.hidden_BTH, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("width", WIDTHS)
def test_shapes_do_not_depend_on_the_length(width, tiny_target):
    """What a graph would record at one length is what it must replay at every other."""
    target = tiny_target("llama")
    quick = StaticTarget(target, WIDTHS)

    def step_at(length: int, chosen: Target) -> Shapes:
        cache = chosen.new_cache(48)
        chosen.forward(ids(length), cache)
        if isinstance(cache, StaticCache):
            inputs = [ids(width), torch.arange(length, length + width)]
            step = quick._step(cache, True)
            return operations(lambda: step(*inputs))
        return operations(lambda: chosen.forward(ids(width), cache))

    short, long = step_at(5, quick), step_at(31, quick)
    assert short.seen == long.seen
    assert len(short.seen) > 100
    assert not long.asks_the_device()
    assert step_at(5, target).seen != step_at(31, target).seen, "the dynamic path must fail this test"


def test_the_draft_chain_has_the_same_shapes_everywhere(tiny_target):
    target = tiny_target("llama")
    decoder = StaticChainDecoder(target, make(target), 3)
    step = decoder.new_proposer(40)._chain_step()
    taps = torch.zeros(4, 3 * target.hidden_size)
    # The first call packs weights, which a second one does not repeat.
    places = ([5, 1], [5, 1], [30, 4])
    runs = [operations(lambda p=place: step(ids(4)[0], taps, torch.tensor(p))) for place in places]
    assert runs[1].seen == runs[2].seen
    assert not runs[1].asks_the_device()
    growing = ChainDecoder(target, decoder.draft, 3).new_proposer(40)
    proposed = operations(lambda: growing.propose(ids(4)[0], taps, 3, lambda logits: logits.argmax(-1)))
    assert not proposed.asks_the_device(), "a draft step would wait for the device"
    asked = operations(lambda: decoder.draft.rotary(torch.arange(3)))
    assert asked.asks_the_device(), "what asks must fail this test"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_static_chains_decode_what_dynamic_ones_decode(architecture, tiny_target):
    """Also the next request in the same buffers, shorter and then longer than the first."""
    target = tiny_target(architecture, initializer_range=0.05, num_hidden_layers=3, taps=(1, 2, 3))
    draft = make(target)
    quick, plain = StaticChainDecoder(target, draft, 4, capacity=20), PlainDecoder(StaticTarget(target, (1,)))
    accepted = 0
    for prompt in (ids(9)[0].tolist(), [7], [5, 9, 70], ids(12, seed=9)[0].tolist(), ids(40)[0].tolist()):
        expected, got = ChainDecoder(target, draft, 4).generate(prompt, 18), quick.generate(prompt, 18)
        assert got.ids == expected.ids == plain.generate(prompt, 18).ids
        assert [(r.proposed, r.accepted) for r in got.rounds] == [(r.proposed, r.accepted) for r in expected.rounds]
        accepted += sum(r.accepted for r in expected.rounds)
    assert accepted


@pytest.mark.parametrize("greedy_drafts", [False, True])
def test_static_chains_sample_what_dynamic_ones_sample(greedy_drafts, tiny_target):
    target = tiny_target("llama", initializer_range=0.1, num_hidden_layers=3, taps=(1, 2, 3))
    draft, sampler, prompt = make(target), Sampler(0.8), ids(6)[0].tolist()
    quick = StaticChainDecoder(target, draft, 3, sampler, greedy_drafts)
    slow = ChainDecoder(target, draft, 3, sampler, greedy_drafts=greedy_drafts)
    assert quick.generate(prompt, 16, seed=5).ids == slow.generate(prompt, 16, seed=5).ids


def test_a_recording_works_on_its_own_buffers(monkeypatch):
    """Replay sees new inputs only through the buffers, and what it returned before stays as it was."""
    addresses = set[int]()

    def double(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        addresses.add(x.data_ptr())
        return (x * 2,)

    eager = Recorded(double, [torch.ones(3)])
    assert [eager(torch.full((3,), v))[0].tolist() for v in (1.0, 4.0)] == [[2.0] * 3, [8.0] * 3]
    assert len(addresses) == 1

    def record(self: Recorded) -> None:
        """A graph of the CPU: replaying it runs the function into the outputs of the first run."""
        self.outputs = self.function(*self.inputs)
        self.graph = self

    monkeypatch.setattr(graphs, "graphs_available", lambda device: True)
    monkeypatch.setattr(Recorded, "_record", record)
    monkeypatch.setattr(Recorded, "replay", lambda self: self.outputs[0].copy_(self.inputs[0] * 2), raising=False)
    replayed = Recorded(double, [torch.ones(3)])
    first, second = replayed(torch.full((3,), 5.0))[0], replayed(torch.full((3,), 7.0))[0]
    assert first.tolist() == [10.0] * 3 and second.tolist() == [14.0] * 3


def test_graphs_are_for_cuda_only(monkeypatch):
    assert not graphs_available(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert graphs_available(torch.device("cuda"))
    assert not graphs_available(torch.device("cpu"))


def test_what_does_not_fit_is_refused(tiny_target):
    target = tiny_target("llama")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserError, match="tiny-llama has a dynamic rope"):
        StaticTarget(tiny_target("llama", rope_parameters=rope), (4,))
    quick = StaticTarget(target, (4,))
    cache = quick.new_cache(6)
    quick.forward(ids(6), cache)
    quick.forward(ids(4), cache)
    with pytest.raises(ValueError, match="cannot hold"):
        quick.forward(ids(1), cache)
