"""``redraft study`` in a process of its own: killed in a cell's training, resumed to the same results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

CELLS = 4


def write_config(world: Path) -> Path:
    """A study of two trained methods and two seeds of one, on a third of a second of training each."""
    asked = (world / "prompts.jsonl").read_text().splitlines(keepends=True)
    (world / "train.jsonl").write_text("".join(asked[:34]))
    (world / "evaluation.jsonl").write_text("".join(asked[34:]))
    target = {"target": str(world / "target"), "draft": str(world / "draft"), "prompts": str(world / "train.jsonl")}
    config = {
        "name": "killed",
        "targets": {"t": {**target, "evaluation": str(world / "evaluation.jsonl"), "heldout_prompts": 6}},
        "grid": [{"methods": ["fc"], "seeds": [0, 1]}, {"methods": ["full"]}],
        "max_new_tokens": 16,
        "evaluation_tokens": 12,
        "gamma": 3,
        "train": {"epochs": 6, "batch_anchors": 64, "evaluate_every": 2},
        "dtype": "float32",
    }
    path = world / "study.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def start(config: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "redraft.cli.main", "study", str(config), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(config: Path, out: Path) -> dict:
    process = start(config, out)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return json.loads((out / "results.json").read_text())


def kill_in_training(config: Path, out: Path, finished: int) -> None:
    """Kill -9 as soon as ``finished`` cells have a record and another one is between two of its checkpoints."""
    process = start(config, out)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        # A cell that has its record but still its checkpoints is finished, and the results may not name it yet.
        states = out.glob("cells/*/train/state.json")
        under_way = [path for path in states if not (path.parent.parent / "record.json").exists()]
        if len(list(out.glob("cells/*/record.json"))) >= finished and under_way:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the study ended before it could be killed"


def test_a_study_that_is_killed_in_a_cell_ends_like_one_that_is_not(world: Path, tmp_path: Path) -> None:
    config = write_config(world)
    whole = finish(config, tmp_path / "whole")
    killed = tmp_path / "killed"
    kill_in_training(config, killed, 2)
    half = json.loads((killed / "results.json").read_text())
    assert not half["finished"] and 2 <= len(half["cells"]) < CELLS
    resumed = finish(config, killed)
    assert resumed["finished"] and len(resumed["cells"]) == CELLS
    # What was finished is not done again.
    assert resumed["cells"][: len(half["cells"])] == half["cells"]
    for left, right in zip(whole["cells"], resumed["cells"], strict=True):
        for name in ("key", "rounds", "flops", "trained_tokens", "private_bytes"):
            assert left.get(name) == right.get(name), name
        assert left.get("heldout") == right.get("heldout")
    assert whole["figures"]["pooled"][1]["tau"] == resumed["figures"]["pooled"][1]["tau"]
    stages = {entry["stage"]: entry for entry in resumed["ledger"]["stages"]}
    expected = {entry["stage"]: entry for entry in whole["ledger"]["stages"]}
    assert stages.keys() == expected.keys()
    assert stages["t: generate regenerated"]["tokens"] == expected["t: generate regenerated"]["tokens"]
