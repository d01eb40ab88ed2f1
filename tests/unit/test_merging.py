"""Merging a private part one matrix at a time, and comparing what was written piece by piece."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.artifact import holds_tensors, write_tensors
from redraft.drafts import files, merging
from redraft.drafts.base import is_private
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.drafts.groups import attach_low_rank, attach_private
from redraft.drafts.layers import LowRank
from redraft.drafts.merging import updated
from redraft.errors import UserError

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tiny_drafts.py")))


def split(part: str) -> Eagle3Draft:
    """A draft with a private part that changes it."""
    draft = Eagle3Draft(TINY.EAGLE3)
    found = attach_private(draft, 8) if part == "expert" else attach_low_rank(draft, 2)
    if part == "both":
        found = attach_low_rank(attach_private(draft, 8), 2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            assert parameter.any(), name
    return found


@pytest.mark.parametrize("part", ["expert", "low rank", "both"])
def test_a_file_merged_as_it_is_written_is_that_of_the_merged_draft(tmp_path, part):
    draft = split(part)
    merged, lazily = draft.merged(), draft.dense_state()
    assert set(lazily) == set(merged.state_dict()) and not any(map(is_private, lazily))
    for name, tensor in merged.state_dict().items():
        assert torch.equal(lazily[name], tensor)
    files.save_draft(tmp_path / "at once", merged, {"method": "eda"})
    files.save_draft(tmp_path / "one by one", draft, {"method": "eda"}, merge=True)
    for file in ("draft.safetensors", "redraft.json"):
        assert (tmp_path / "at once" / file).read_bytes() == (tmp_path / "one by one" / file).read_bytes()


def test_tensors_that_the_part_leaves_alone_are_not_copied():
    draft = split("expert")
    state = draft.dense_state()
    own = {name for name, tensor in draft.state_dict().items() if state.get(name) is not None}
    shared = {name for name in own if state[name].data_ptr() == draft.state_dict()[name].data_ptr()}
    assert own - shared == {f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def test_routed_experts_are_refused():
    with pytest.raises(UserError, match="eda-moe"):
        attach_private(Eagle3Draft(TINY.EAGLE3), 8, experts=2).dense_state()


def test_a_part_over_its_base_takes_the_bases_tensors_or_copies_of_them(tmp_path):
    draft = split("expert")
    names = [name for name in draft.state_dict() if is_private(name)]
    base = Eagle3Draft(TINY.EAGLE3)
    files.save_private(tmp_path / "part", draft, names, base.base_hash(), {})
    for copy in (True, False):
        joined, _ = files.load_private(tmp_path / "part", base, base.base_hash(), copy=copy)
        assert (joined.fc.weight.data_ptr() == base.fc.weight.data_ptr()) is not copy
        assert torch.equal(joined.fc.weight, base.fc.weight)


def test_a_file_holds_what_was_written_and_nothing_else(tmp_path):
    state = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.zeros(0, 2, dtype=torch.bfloat16)}
    path = tmp_path / "x.safetensors"
    write_tensors(path, state)
    assert holds_tensors(path, state)
    for name, tensor in (("a", state["a"].half()), ("a", state["a"].T), ("b", state["b"] + 1), ("d", state["b"])):
        assert not holds_tensors(path, state | {name: tensor})
    assert not holds_tensors(path, {name: state[name] for name in "ab"})
    # Written by somebody else, in whatever order.
    save_file({name: load_file(path)[name] for name in "cba"}, path)
    assert holds_tensors(path, state)
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert not holds_tensors(path, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_update_is_added_by_rows_as_at_once(monkeypatch, dtype):
    monkeypatch.setattr(merging, "PIECE", 40)
    torch.manual_seed(0)
    update = LowRank(torch.nn.Linear(16, 25, bias=False), 3, 4.0)
    torch.nn.init.normal_(update.outer)
    whole = torch.randn(25, 16).to(dtype)
    wanted = whole.double() + update.scale * update.outer.detach().double() @ update.inner.detach().double()
    parts = list(updated(whole, update))
    found = torch.cat(parts)
    assert found.dtype == dtype and len(parts) > 5
    torch.testing.assert_close(found, wanted.to(dtype))
