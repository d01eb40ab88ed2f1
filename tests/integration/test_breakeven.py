"""The break-even benchmark on tiny shapes: what it times adds up, and smaller drafters alone are timed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from redraft.errors import UserError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "breakeven.py"


def test_break_even_is_what_a_round_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(SCRIPT))
    shapes = {"tiny": (6, 64, 128, 4, 2, 300, True), "untied": (3, 32, 64, 2, 2, 300, False)}
    monkeypatch.setitem(script["main"].__globals__, "SHAPES", shapes)
    target = script["random_target"]("untied", "float32", "cpu")
    assert all(torch.isfinite(parameter).all() for parameter in target.model.parameters())
    assert torch.isfinite(target.logits(target.forward(torch.tensor([[1, 2, 3]])).hidden_BTH)).all()
    out = tmp_path / "breakeven.json"
    options = [
        "--targets",
        "tiny,untied",
        "--drafters",
        "goel,1/2,layers:1",
        "--repeats",
        "2",
        "--length",
        "8",
        "--tau",
        "a=2@3",
    ]
    monkeypatch.setattr("sys.argv", ["x", *options, "--dtype", "float32", "--out", str(out)])
    script["main"]()
    cells = json.loads(out.read_text())["cells"]
    assert {(cell["target"], cell["drafter"]) for cell in cells} == {
        (target, drafter) for target in ("tiny", "untied") for drafter in ("1/2", "layers:1")
    }
    for cell in cells:
        steps = cell["gamma"] * cell["draft_step_over_plain"] + cell["verify_over_plain"]
        assert cell["break_even"] == pytest.approx(steps)
        projected = {"a": pytest.approx(2 / cell["break_even"])} if cell["gamma"] == 3 else {}
        assert cell["projected_speedup"] == projected, "acceptance at one gamma says nothing of another"
    for text in ("a=2", "a=2.5@1", "a=0.5@3"):
        with pytest.raises(UserError, match="NAME=VALUE@GAMMA"):
            script["known"](text)
