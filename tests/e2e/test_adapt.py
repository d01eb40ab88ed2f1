"""``redraft adapt`` as a user runs it: in a process of its own, killed in every stage, resumed to the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from redraft.data.store import read_rows


def command(world: Path, out: Path) -> list[str]:
    arguments = {
        "target": world / "target",
        "draft": world / "draft",
        "prompts": world / "prompts.jsonl",
        "out": out,
        "dtype": "float32",
        "max-new-tokens": 24,
        "bench-tokens": 16,
        "bench-prompts": 4,
        "heldout-prompts": 6,
        "batch-size": 4,
        "private-width": 16,
        "gamma": 3,
        "budget": "75%",
    }
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "redraft.cli.main", "adapt", *flags]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=environment)


def kill_when(arguments: list[str], appears: Path) -> bool:
    """Start, kill -9 as soon as a file is there; whether the process was still running then."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if appears.exists() and (appears.is_dir() or appears.stat().st_size):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    process.kill()
    process.wait()
    return False


def test_a_run_that_is_killed_in_every_stage_ends_like_one_that_is_not(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(command(world, whole))
    assert done.returncode == 0, done.stderr
    stages = ("features/index.jsonl", "responses.jsonl", "selection.json", "train/state.json", "merged", "export-vllm")
    kills = sum(kill_when(command(world, killed), killed / stage) for stage in stages)
    assert kills >= 5
    done = run(command(world, killed))
    assert done.returncode == 0, done.stderr
    for name in ("responses.jsonl", "heldout.jsonl"):
        assert {r.key: r for r in read_rows(whole / name)} == {r.key: r for r in read_rows(killed / name)}
    a, b = (json.loads((folder / "selection.json").read_text()) for folder in (whole, killed))
    assert a["entries"] == b["entries"]
    for name in ("merged/draft.safetensors", "private/private.safetensors"):
        left, right = load_file(whole / name), load_file(killed / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    left, right = (json.loads((folder / "train.json").read_text()) for folder in (whole, killed))
    assert left["history"] == right["history"]
    results = [json.loads((f / "bench.json").read_text()) for f in (whole, killed)]
    taus = [result["drafts"]["aligned"]["tau_pooled"] for result in results]
    assert taus[0] == taus[1]
    for result in results:
        # The type that was named is that of all contestants.
        assert result["plain"].keys() == {"float32", "fastest"} and result["contest"] == {}
        for draft in result["drafts"].values():
            assert draft["identical_to_plain"] == 4 and draft["dtype"] == "float32"
    assert (whole / "report.html").stat().st_size > 10_000


def test_a_run_directory_of_other_settings_is_refused_in_one_line(world, tmp_path):
    arguments = command(world, tmp_path / "run")
    assert kill_when(arguments, tmp_path / "run" / "responses.jsonl")
    done = run([*arguments, "--private-width", "8"])
    assert done.returncode == 2
    assert "another private_width" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--prompts", "missing.jsonl", "does not exist"),
        ("--draft", "nowhere", "nowhere"),
        ("--target", "nowhere/at-all", "nowhere/at-all"),
        ("--budget", "0%", "selects nothing"),
        ("--method", "edda", "edda"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flag, value, words, world, tmp_path):
    done = run([*command(world, tmp_path / "run"), flag, value])
    assert done.returncode == 2
    assert words in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
