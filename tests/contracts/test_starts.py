"""What every start must keep, whatever it does; a new entry of the registry inherits these tests."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from redraft.data.store import Row
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.errors import UserError
from redraft.registries import STARTS
from redraft.settings.texts import parse_start
from redraft.starts.apply import StartContext, apply_start
from redraft.target import Target


def finetuned(base: Target, scale: float = 0.05) -> Target:
    model = copy.deepcopy(base.model)
    generator = torch.Generator().manual_seed(4)
    for weight in model.parameters():
        weight.data += scale * torch.randn(weight.shape, generator=generator)
    return Target(model, base.tokenizer, "fine-tuned", base.taps)


@pytest.fixture
def context(tiny_target: Callable[..., Target]) -> StartContext:
    base = tiny_target(taps=(1, 3, 5))
    generator = torch.Generator().manual_seed(6)
    ids = [torch.randint(4, 128, (16,), generator=generator).tolist() for _ in range(24)]
    rows = [Row(f"r{i}", x[:4], x[4:], 0.0, 0, 1.0, 0, "length", "hash") for i, x in enumerate(ids)]
    return StartContext(finetuned(base), base, rows)


@pytest.fixture
def draft(context: StartContext) -> Eagle3Draft:
    return fresh_draft(context.base_target, list(range(90)), intermediate=32)


@pytest.mark.parametrize("name", STARTS.names())
def test_only_what_is_named_changes(name: str, draft: Eagle3Draft, context: StartContext) -> None:
    old = {key: tensor.clone() for key, tensor in draft.state_dict().items()}
    result = apply_start(name, draft, context)
    assert all(torch.equal(tensor, old[key]) for key, tensor in draft.state_dict().items())
    new = result.draft.state_dict()
    assert set(new) == set(old) and all(new[key].shape == old[key].shape for key in old)
    changed = {key for key in old if not torch.equal(new[key], old[key])}
    assert changed == set(result.changed) and result.draft.config == draft.config
    assert all(torch.isfinite(tensor).all() for tensor in new.values())
    assert (name == "none") == (not changed) and bool(result.notes) == bool(changed)
    assert STARTS.get(name).about and (result.flops > 0) == (result.tokens > 0)


@pytest.mark.parametrize("name", STARTS.names())
def test_the_same_again(name: str, draft: Eagle3Draft, context: StartContext) -> None:
    one, two = (apply_start(name, draft, context).draft.state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", STARTS.names())
def test_what_is_missing_is_named(name: str, draft: Eagle3Draft, context: StartContext) -> None:
    poor = StartContext(context.target)
    needs = STARTS.get(name).needs
    if not needs:
        assert apply_start(name, draft, poor).draft is draft
        return
    with pytest.raises(UserError, match="base target" if "base_target" in needs else "responses"):
        apply_start(name, draft, poor)


def test_starts_combine_in_order(draft: Eagle3Draft, context: StartContext) -> None:
    both = apply_start("vocabulary+ridge", draft, context)
    assert both.changed == ("lm_head.weight", "d2t", "t2d", "fc.weight") and len(both.notes) == 2
    one = apply_start("vocabulary", draft, context).draft
    two = apply_start("ridge", one, context)
    assert all(torch.equal(t, both.draft.state_dict()[k]) for k, t in two.draft.state_dict().items())
    assert both.tokens == two.tokens and set(both.details) == {"vocabulary", "ridge"}


def test_unknown_and_doubled_names() -> None:
    with pytest.raises(UserError, match="unknown start 'rigde' .did you mean ridge"):
        parse_start("delta+rigde")
    with pytest.raises(UserError, match="twice"):
        parse_start("ridge+ridge")
