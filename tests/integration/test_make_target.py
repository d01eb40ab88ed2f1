"""The fine-tuning script on a tiny model: packing without padding, resume, both kinds of output."""

from __future__ import annotations

import gzip
import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from redraft.data.answers import reference_rows
from redraft.data.store import Row
from redraft.errors import UserError
from redraft.loading import load_target
from redraft.target import Target

script = runpy.run_path(str(Path(__file__).with_name("scripts.py")))["script"]
make = script("make_target")
TINY = make.Recipe(rank=0, learning_rate=1e-2, tokens=2000, step_tokens=160, longest=120)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with the files of every domain, a few samples each."""
    for sets in make.DOMAINS.values():
        for name in sets:
            path = tmp_path / "data" / f"{name}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = []
            for i in range(60):
                pair = (f"count to {i} in {path.name[:5]}", "one two three " * (1 + i % 3))
                messages = [
                    {"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)
                ]
                lines.append(json.dumps({"id": f"{name}/{i}", "messages": messages}))
            path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path / "data"


@pytest.fixture
def rows(tiny_tokenizer: Any, data: Path) -> list[Row]:
    return reference_rows(make.domain_conversations("code", data, TINY), tiny_tokenizer, "")


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_packed_samples_do_not_see_each_other(
    architecture: str, rows: list[Row], tiny_target: Callable[..., Target]
) -> None:
    target = tiny_target(architecture)
    before = target.model.config._attn_implementation
    target.model.requires_grad_(True)
    loss, count = make.packed_loss(target, rows[:5])
    loss.backward()
    gradient = target.head.weight.grad.clone(), target.backbone.layers[0].mlp.up_proj.weight.grad.clone()
    target.model.zero_grad()
    total = torch.zeros(())
    for row in rows[:5]:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        logits = target.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        total = total + F.cross_entropy(logits, torch.tensor(row.response_ids), reduction="sum")
    total.backward()
    torch.testing.assert_close(loss, total, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(gradient[0], target.head.weight.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(gradient[1], target.backbone.layers[0].mlp.up_proj.weight.grad, atol=1e-3, rtol=1e-4)
    assert count == sum(len(row.response_ids) for row in rows[:5])
    assert target.model.config._attn_implementation == before


def test_sets_are_mixed_by_their_shares(data: Path) -> None:
    found = make.domain_conversations("code", data, TINY)
    names = [c.id.rpartition("/")[0] for c in found]
    # 60 of gpteacher are half of 120, of which the others give their shares
    assert len(found) == 120 and [names.count(name) for name in make.DOMAINS["code"]] == [24, 60, 36]
    assert found == make.domain_conversations("code", data, TINY)
    assert found != make.domain_conversations("code", data, replace(TINY, seed=1))
    assert make.domain_conversations("code", data, replace(TINY, samples=7)) == found[:7]
    for domain, problem in (("code", "needs the data folder"), ("cooking", "unknown domain 'cooking'")):
        with pytest.raises(UserError, match=problem):
            make.domain_conversations(domain, None, TINY)


def test_budget_and_length_choose_the_samples(rows: list[Row]) -> None:
    train, heldout = make.choose_samples(rows, TINY)
    assert not {r.key for r in train} & {r.key for r in heldout} and len(heldout) == make.HELDOUT
    assert max(map(make.size_of, [*train, *heldout])) <= TINY.longest
    assert TINY.tokens - TINY.longest < sum(map(make.size_of, train)) <= TINY.tokens
    half, _ = make.choose_samples(rows, replace(TINY, passes=2.0))
    assert train[: len(half)] == half and sum(map(make.size_of, half)) <= TINY.tokens / 2
    with pytest.raises(UserError, match="too few"):
        make.choose_samples(rows, replace(TINY, longest=10))


def test_packs_hold_every_sample_of_every_pass(rows: list[Row]) -> None:
    steps = make.packs(rows, replace(TINY, passes=1.5))
    flat = [row.key for pack in steps for row in pack]
    assert len(flat) == round(1.5 * len(rows)) and set(flat[: len(rows)]) == {row.key for row in rows}
    assert len(set(flat[len(rows) :])) == len(flat) - len(rows)
    sizes = [sum(map(make.size_of, pack)) for pack in steps]
    assert max(sizes) <= TINY.step_tokens
    # Only the last pack of a pass may be far from full.
    assert sum(size < TINY.step_tokens - TINY.longest for size in sizes) <= 2


@pytest.mark.parametrize("rank", [0, 4])
def test_a_target_is_made_and_loads(rank: int, data: Path, tiny_target: Callable[..., Target], tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_target().save(base)
    recipe, out = replace(TINY, rank=rank), tmp_path / "out"
    record = make.make_target(load_target(str(base)), str(base), "code", "heavy", recipe, data, out)
    assert record["heldout_loss"]["after"] < record["heldout_loss"]["before"] - 0.3
    assert record["steps"] == len(record["losses"]) and record["tokens"] <= TINY.tokens
    assert json.loads((out / "training.json").read_text()) == record
    names = {path.name for path in out.iterdir()}
    assert ("adapter_model.safetensors" in names) == bool(rank) and ("model.safetensors" in names) == (not rank)
    assert not (tmp_path / "out.work").exists()
    made, old = load_target(str(out)), load_target(str(base))
    held = make.choose_samples(
        reference_rows(make.domain_conversations("code", data, recipe), made.tokenizer, ""), recipe
    )[1]
    assert make.heldout_loss(made, held, 160) == pytest.approx(record["heldout_loss"]["after"], abs=0.05)
    assert made.content_hash() != old.content_hash()
    # There is nothing left to do, so the model is not even looked at.
    assert make.make_target(None, str(base), "code", "heavy", recipe, data, out) == record


@pytest.mark.parametrize("rank", [0, 4])
def test_a_killed_run_ends_with_the_same_weights(
    rank: int, rows: list[Row], tiny_target: Callable[..., Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(TINY, rank=rank, tokens=900)
    steps = make.packs(make.choose_samples(rows, recipe)[0], recipe)

    def run(folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        target = tiny_target()
        make.make_trainable(target, recipe)
        state = make.train(target, steps, recipe, tmp_path / folder, save_seconds=0.0)
        return state, {name: p.detach().clone() for name, p in target.model.named_parameters()}

    whole, weights = run("whole")
    real, calls = make.packed_loss, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(make, "packed_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    state, resumed = run("killed")
    assert len(calls) == len(steps) + 1 and state["losses"] == whole["losses"]
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    with pytest.raises(UserError, match="another recipe"):
        make.train(tiny_target(), steps, replace(recipe, seed=1), tmp_path / "killed")


def test_symbolic_problems_are_those_of_the_quickstarts_adapter() -> None:
    pytest.importorskip("reasoning_gym")
    found = make.domain_conversations("symbolic", None, replace(TINY, samples=3))
    assert [c.id.split("/")[1] for c in found] == [str(make.SYMBOLIC_SEED)] * 3
