"""``redraft adapt`` on the embedded model, once left alone and once killed (-9) in every stage: both must end the same.

    python runs/kill_check.py --work out/kill --out benchmarks/results/kill-check.json

A stage is known by the file that the one before ends with, or that it begins with. What is compared: every response
and its features, the selection, the training curve, every trained tensor bit by bit, and tau of the benchmark where
one data type won the plain baseline both times.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from redraft import provenance
from redraft.adaptation.quickstart import asset, embedded_prompts
from redraft.artifact import atomic_write_json, read_json
from redraft.data.store import read_rows
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.rows import anchors

FEATURES = "features/index.json"
STAGES = {
    "features before their rows": FEATURES,
    "regenerate": "responses.jsonl",
    "regenerate held-out": "heldout.jsonl",
    "start": "selection.json",
    "train": "train/state.json",
    "save": "private",
    "export": "train.json",
    "bench": "export-vllm",
    "report": "bench.json",
}
SETTINGS = {
    "max-new-tokens": 64,
    "bench-tokens": 32,
    "bench-prompts": 4,
    "heldout-prompts": 8,
    "gamma": 3,
    "rank": 16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for both runs")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    train, evaluation = embedded_prompts(options.work, options.prompts, SETTINGS["bench-prompts"])
    whole, killed = options.work / "whole", options.work / "killed"
    finish(command(whole, train, evaluation))
    kills = {name: kill_when(command(killed, train, evaluation), killed / file) for name, file in STAGES.items()}
    finish(command(killed, train, evaluation))
    compared = compare(whole, killed)
    result = {
        "schema": "redraft.kill/1",
        "provenance": provenance.collect(seed=0, device="cpu"),
        "settings": SETTINGS | {"prompts": options.prompts},
        "killed_while_running": kills,
        "equal": compared,
    }
    atomic_write_json(options.out, result)
    for name, found in {**{f"killed in {k}": v for k, v in kills.items()}, **compared}.items():
        print(f"{name:32} {found}")


def command(out: Path, prompts: Path, evaluation: Path) -> list[str]:
    values: dict[str, Any] = {
        "target": asset("maths-lora"),
        "draft": asset("general-draft"),
        "prompts": prompts,
        "eval-prompts": evaluation,
        "out": out,
        **SETTINGS,
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    steps = ["--train", "epochs=3", "--train", "batch_anchors=256", "--train", "evaluate_every=5"]
    return [sys.executable, "-m", "redraft.cli.main", "adapt", *flags, *steps]


def finish(arguments: list[str]) -> None:
    """Run to the end. Raises ``UserError`` when it does not end well."""
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"adapt ended with exit code {done.returncode}: {done.stderr.strip()[-400:]}")


def kill_when(arguments: list[str], appears: Path) -> bool:
    """Start, kill -9 as soon as a file or folder is there and has something in it; whether it was still running."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if appears.is_dir() or (appears.is_file() and appears.stat().st_size):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def compare(whole: Path, killed: Path) -> dict[str, Any]:
    """What is the same in both run directories."""
    found: dict[str, Any] = {}
    for name in ("responses.jsonl", "heldout.jsonl"):
        one, two = ({row.key: row for row in read_rows(folder / name)} for folder in (whole, killed))
        found[name] = one == two
    stores = [FeatureStore(folder / "features", read_json(folder / FEATURES)["identity"]) for folder in (whole, killed)]
    found["features"] = stores[0].index.keys() == stores[1].index.keys() and all(
        torch.equal(*pair)
        for row in read_rows(whole / "responses.jsonl")
        if anchors(row)
        for pair in zip(*(store.get(row) for store in stores), strict=True)
    )
    selections = [json.loads((folder / "selection.json").read_text())["entries"] for folder in (whole, killed)]
    found["selection"] = selections[0] == selections[1]
    curves = [json.loads((folder / "train.json").read_text())["history"] for folder in (whole, killed)]
    found["training curve"] = curves[0] == curves[1]
    for name in ("merged/draft.safetensors", "private/private.safetensors"):
        left, right = load_file(whole / name), load_file(killed / name)
        found[name] = left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    results = [json.loads((folder / "bench.json").read_text()) for folder in (whole, killed)]
    types = [{name: draft["dtype"] for name, draft in result["drafts"].items()} for result in results]
    if types[0] == types[1]:
        taus = [{name: draft["tau_pooled"] for name, draft in result["drafts"].items()} for result in results]
        found["tau"] = taus[0] == taus[1]
    else:
        found["tau"] = "another data type was faster, not compared"
    return found


if __name__ == "__main__":
    main()
