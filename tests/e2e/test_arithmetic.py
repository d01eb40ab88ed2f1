"""On a processor that emulates bfloat16 nothing in the way of an adaptation multiplies matrices in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from redraft import arithmetic
from redraft.adaptation.adapt import AdaptRun
from redraft.adaptation.probe import probe
from redraft.adaptation.runs import supervised_rows
from redraft.evaluate.speed import Prompt
from redraft.settings.runs import AdaptConfig

PRODUCTS = ("mm", "linear", "matmul", "dot_product", "einsum", "mkldnn")


class Products(TorchDispatchMode):
    """Notes the data types of every product of matrices, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if any(part in name for part in PRODUCTS):
            for given in tree_leaves((args, kwargs)):
                if isinstance(given, Tensor) and given.is_floating_point():
                    self.seen.setdefault(given.dtype, set()).add(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def machine(monkeypatch):
    """``machine(bfloat16, float32)``: a processor of these speeds."""

    def set_speeds(bfloat16: float, float32: float) -> None:
        arithmetic.fastest.cache_clear()
        monkeypatch.setattr(arithmetic, "trial", lambda: {"bfloat16": bfloat16, "float32": float32})

    yield set_speeds
    arithmetic.fastest.cache_clear()


def settings(world: Path, out: Path, **more: Any):
    small = {"max_new_tokens": 16, "heldout_prompts": 6, "bench_prompts": 2, "bench_tokens": 12, "gamma": 3}
    files = {"target": world / "target", "draft": world / "draft", "prompts": world / "prompts.jsonl"}
    return AdaptConfig(**{name: str(path) for name, path in files.items()} | {"out": out} | small | more)


def adapted(config: Any) -> Products:
    """The products of all stages up to the benchmark."""
    run = AdaptRun(config, lambda text: None)
    with Products() as found:
        run.source.write()
        run.select()
        run.train()
        run.export()
        prompts = [Prompt(row.id, list(row.prompt_ids)) for row in supervised_rows(run.source.heldout)[:2]]
        probe(run.target, run.aligned, prompts, 3, 12)
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_product_is_left_in_bfloat16_where_float32_is_faster(method, world, tmp_path, machine):
    with Products() as planted:
        torch.ones(2, 2, dtype=torch.bfloat16) @ torch.ones(2, 2, dtype=torch.bfloat16)
    assert planted.seen == {torch.bfloat16: {"aten::mm"}}
    machine(0.9, 58.0)
    config = settings(world, tmp_path / "run", method=method, train={"epochs": 1, "optimizer": "muon"})
    found = adapted(config)
    assert torch.float32 in found.seen and not found.seen.get(torch.bfloat16)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "float32"
    state = json.loads((tmp_path / "run" / "train" / "state.json").read_text())["state"]
    assert state["arithmetic"] == {"precision": "float32", "muon": "float32"}


def test_a_run_moves_to_another_processor_and_stays_what_it_was(world, tmp_path, machine):
    """Begun where bfloat16 is fast; gone on with where it is not, it neither refuses nor changes its type."""
    machine(400.0, 90.0)
    config = settings(world, tmp_path / "run", train={"epochs": 1})
    begun = AdaptRun(config, lambda text: None)
    begun.source.write()
    machine(0.9, 58.0)
    said: list[str] = []
    moved = AdaptRun(config, said.append)
    assert moved.target.dtype == torch.bfloat16 and moved.asked_dtype == "auto"
    assert any("auto" in line and "bfloat16" in line for line in said)
    result = moved.run()
    assert set(result["contest"]) == {"plain", "stale", "aligned"}
    for name, draft in result["drafts"].items():
        assert draft["dtype"] == max(result["contest"][name].items(), key=lambda held: held[1]["tokens_per_second"])[0]
        assert draft["dtype"] == "bfloat16" or draft["identical_to_plain"] == draft["divergence"]["identical"] == 2
    assert result["provenance"]["arithmetic"]["instructions"] == torch.backends.cpu.get_cpu_capability()
