"""The script of a first run on a GPU, on the CPU at tiny shapes: every section ends, and its checks hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(SCRIPT), "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, env=known)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = run(out, "--device", "cpu", "--tiny", "--minutes", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_every_section_comes_to_its_end_and_holds(result):
    sections = result["sections"]
    assert list(sections) == ["machine", "exact", "training", "speed", "steps", "quickstart"]
    assert {one["outcome"] for one in sections.values()} == {"done"}
    assert result["holds"] and result["dry_run"]
    found = [finding for one in sections.values() for finding in one["found"].values() if isinstance(finding, dict)]
    assert not [finding for finding in found if "error" in finding]


def test_texts_are_compared_where_proposals_are_kept_and_lost(result):
    exact = result["sections"]["exact"]["found"]
    greedy = {name: found for name, found in exact.items() if name.startswith("greedy")}
    assert len(greedy) == 7 and all(found["identical"] == found["texts"] > 1 for found in greedy.values())
    assert 1.2 < greedy["greedy chain:4"]["tau_pooled"] < 5
    draws = exact["draws"]
    assert draws["tests"] > 20 and draws["least_p_corrected"] >= 0.01
    assert set(draws["draws"]) == {"chain", "tree", "dynamic tree", "static chain", "batched", "without a draft"}


def test_training_repeats_resumes_and_is_measured(result):
    training, speed = (result["sections"][name]["found"] for name in ("training", "speed"))
    assert training["a step twice, lora in float32"]["same_bits"]
    resumed = training["stopped and gone on with, in float32"]
    assert resumed["same_bits"] and resumed["stopped_in_step"] < resumed["steps"]
    for found in speed.values():
        assert found["positions_per_second"] > 0 and 0 < found["optimiser_share"] < 1
        # Six operations a trained weight and position at the least: forward, and the gradients of both sides.
        assert found["operations"] > 2 * found["parameters"] * 0.1 * found["positions"]


def test_what_the_machine_lacks_is_said_in_one_line(tmp_path):
    # CUDA is hidden from the process, so that the answer is the same on every machine.
    done = run(tmp_path / "gpu.json", "--tiny", "--sections", "machine", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stderr.startswith("error: torch finds no CUDA device here")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "gpu.json").exists()


MISPLACED = """
import sys
sys.path.insert(0, sys.argv[1])
from onecard import elsewhere
device = elsewhere.play()
import torch
layer = torch.nn.Linear(3, 2).to(device)
layer(torch.ones(4, 3, device=device)).sum().backward()
print(layer.weight.grad.device.type, layer.weight.grad.cpu().tolist(), len(elsewhere.waits))
try:
    torch.ones(3, device=device) + torch.ones(3)
except RuntimeError as error:
    print(error)
"""


def test_a_device_played_on_the_cpu_refuses_what_is_made_in_the_wrong_place():
    words = [sys.executable, "-c", MISPLACED, str(ROOT / "benchmarks")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 0, done.stderr
    grown, refused = done.stdout.splitlines()
    assert grown == "elsewhere [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]] 1"
    assert refused == "add of tensors on the device and on the CPU, [[3]]"
