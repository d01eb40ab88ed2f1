"""One training in two processes against the same in one: weights, held-out tau, and going on with another number.

    python benchmarks/scale/processes.py --work out/processes --out benchmarks/results/scale-processes.json

The embedded model answers prompts (``--prompts``) once; then ``redraft train`` trains the low-rank part of its general
draft on the stored answers for at least 50 steps in float32: alone, under ``torchrun`` with two processes, and twice
more with a kill -9 of every process in the middle, begun by two and ended by one and the other way round. Compared are
the weights of the last step (not of the best one) and the held-out tau at every evaluation. Each run is read where it
is there, so the same command goes on.

Exit status 1 where weights are further apart than 1e-4 or taus differ at all.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from redraft import provenance
from redraft.files import atomic_write_json

LARGEST = 1e-4
MODEL = "embedded:smollm2-135m-instruct"
ASSETS = Path(__file__).resolve().parents[2] / "src/redraft/assets"
DATA = Path(os.environ.get("REDRAFT_DATA", "../shared/data"))
SETTINGS = ("batch_anchors=256", "evaluate_every=10", "patience=0", "save_seconds=1e9")
EPOCHS, KILLED_AT = 3, 20
# name: processes before the kill, processes to the end
RUNS = {"one": (1, 1), "two": (2, 2), "two, then one": (2, 1), "one, then two": (1, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--prompts", type=Path, help="prompts to answer (default: grade-school maths of the data)")
    parser.add_argument("--limit", type=int, default=96)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prompts, answers = options.work / "prompts.jsonl", options.work / "answers.jsonl"
    source = options.prompts or DATA / "math/gsm8k.train.jsonl.gz"
    with gzip.open(source, "rt") if source.suffix == ".gz" else open(source) as lines:
        prompts.write_text("".join(itertools.islice(lines, options.limit)))
    told = ["--prompts", str(prompts), "--max-new-tokens", "64", "--out", str(answers)]
    call(1, ["regenerate", "--target", MODEL, "--dtype", "float32", *told])
    seconds = {name: trained(folder(options.work, name), name, answers) for name in RUNS}
    found = {name: state(folder(options.work, name)) for name in RUNS}
    rows = []
    for name in list(RUNS)[1:]:
        apart = {key: float((value - found["one"][0][key]).abs().max()) for key, value in found[name][0].items()}
        largest = max(float(value.abs().max()) for value in found["one"][0].values())
        taus = max(abs(a - b) for (_, a), (_, b) in zip(found[name][1], found["one"][1], strict=True))
        rows.append({"run": name, "largest_weight_difference": max(apart.values()), "largest_weight": largest})
        rows[-1] |= {"tau_difference": taus, "history": found[name][1], "seconds": seconds[name]}
        print(rows[-1], flush=True)
    result = {
        "schema": "redraft.processes/1",
        "steps": found["one"][1][-1][0],
        "largest_weight_difference": max(row["largest_weight_difference"] for row in rows),
        "tau_difference": max(row["tau_difference"] for row in rows),
        "one": {"history": found["one"][1], "seconds": seconds["one"]},
        "runs": rows,
        "provenance": provenance.collect(0, "cpu"),
    }
    if options.out is not None:
        atomic_write_json(options.out, result)
    return int(result["largest_weight_difference"] > LARGEST or result["tau_difference"] > 0)


def trained(place: Path, name: str, answers: Path) -> float:
    """Seconds of a run in ``place``, from nothing; those that its result says where it is there."""
    done = place / "seconds.json"
    if done.exists():
        return float(json.loads(done.read_text())["seconds"])
    shutil.rmtree(place, ignore_errors=True)
    if (features := place.parent / "one" / "features").is_dir():
        shutil.copytree(features, place / "features")
    first, last = RUNS[name]
    words = ["train", "--target", MODEL, "--dtype", "float32", "--draft", str(ASSETS / "general-draft")]
    words += ["--responses", str(answers), "--out", str(place), "--heldout", "16", "--setting", f"epochs={EPOCHS}"]
    words += [w for s in SETTINGS for w in ("--setting", s)]
    began = time.monotonic()
    if first != last:
        call(first, words, place)
    call(last, words)
    spent = time.monotonic() - began
    done.write_text(json.dumps({"seconds": spent}))
    return spent


def call(processes: int, words: list[str], killed_in: Path | None = None) -> None:
    """A command in so many processes; where ``killed_in`` names its folder, until its training is some steps old."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    process = subprocess.Popen([sys.executable, *start, "-m", "redraft", *words])
    while killed_in is not None and process.poll() is None:
        state = killed_in / "train/state.json"
        if state.exists() and json.loads(state.read_text())["state"]["step"] >= KILLED_AT:
            for number in (*children(process.pid), process.pid):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.2)
    code = process.wait()
    if killed_in is None and code or killed_in is not None and code != -signal.SIGKILL:
        raise SystemExit(f"{' '.join(words)} in {processes} processes ended with {code}")


def children(parent: int) -> list[int]:
    """The processes that a process has started: torchrun puts each of its own into a session of its own."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(number) for number in found.split()]


def folder(work: Path, name: str) -> Path:
    return work / name.replace(", ", "-").replace(" ", "-")


def state(place: Path) -> tuple[dict[str, Any], list[list[float]]]:
    """The weights of the last step, and (step, held-out tau)."""
    stored = json.loads((place / "train/state.json").read_text())
    tensors = load_file(place / "train" / stored["file"])
    return {k: v for k, v in tensors.items() if k.startswith("weight/")}, stored["state"]["history"]


if __name__ == "__main__":
    sys.exit(main())
