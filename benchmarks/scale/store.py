"""The row store and the index of features at a size, an older build and this one in turns.

    git worktree add out/before REVISION
    python benchmarks/scale/store.py --before out/before/src --work out/scale --rows 200000 --large 1000000

A row has 100 prompt tokens and 200 response tokens, drawn evenly from 49,152 ids: 1.9 kB in its file. Every figure is of
a process of its own, in which only the store is imported; the two builds take turns, and the order changes with every
turn. What is measured, in seconds:

- ``write``: ``RowWriter.append`` of all rows, as many at a time as ``redraft regenerate`` of that build hands over (32
  before, 512 now); ``write_32``: 32 at a time, each time waiting for the disk. Drawing the rows does not count.
- ``open``: ``RowWriter`` on the whole file, as a resumed run opens it; ``open_killed``: the same without the index, as
  after kill -9; ``read``: ``read_rows``, and then every token of every row once, in order.
- ``peak_mb``: the highest resident memory of the process of each, the interpreter and its modules (``empty``) included.
- ``index``: bytes written to the index of a folder of features for ``--features`` rows, 25 to a shard: 256 MB of states
  of a model of 8 billion parameters are the states of about so many rows.

Speed-ups are medians over the turns of the ratio within a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = "redraft.scale-store/1"
ROOT = Path(__file__).resolve().parents[2]
PROMPT, RESPONSE, VOCABULARY, SHARD_ROWS = 100, 200, 49_152, 25
FLUSH = {"before": 32, "now": 512}
STEPS = ("write", "write_32", "open", "open_killed", "read")


# -- one process: what is done in it is imported from the build that PYTHONPATH names ----------------------------------
def drawn(rows: int, portion: int) -> Iterator[list[Any]]:
    """Rows in portions, the same for both builds."""
    from redraft.data.store import Row

    order = np.random.default_rng(0)
    for start in range(0, rows, portion):
        found = []
        for number in range(start, min(start + portion, rows)):
            ids = order.integers(0, VOCABULARY, PROMPT + RESPONSE).tolist()
            drawn = 0.0, 0, 1.0, 0, "stop", "0123456789abcdef"
            found.append(Row(f"prompt-{number:07d}", ids[:PROMPT], ids[PROMPT:], *drawn))
        yield found


def write(path: Path, rows: int, portion: int) -> float:
    from redraft.data.store import RowWriter

    path.unlink(missing_ok=True)
    began = time.perf_counter()
    drawing = 0.0
    with RowWriter(path) as writer:
        portions = drawn(rows, portion)
        while True:
            before = time.perf_counter()
            found = next(portions, None)
            drawing += time.perf_counter() - before
            if found is None:
                break
            writer.append(found)
    return time.perf_counter() - began - drawing


def reopen(path: Path, rows: int, _: int) -> float:
    from redraft.data.store import RowWriter

    began = time.perf_counter()
    with RowWriter(path) as writer:
        assert len(writer.rows) == rows
        took = time.perf_counter() - began
    return took


def read(path: Path, rows: int, _: int) -> float:
    from redraft.data.store import read_rows

    began = time.perf_counter()
    found = read_rows(path)
    total = sum(row.prompt_ids[0] + len(row.response_ids) for row in found)
    assert len(found) == rows and total >= RESPONSE * rows
    return time.perf_counter() - began


def index(folder: Path, rows: int, portion: int) -> int:
    """The bytes that go to the disk beside the shards."""
    import torch

    from redraft.features import FeatureStore, RowFeatures

    store, tensor, before, shards = FeatureStore(folder, {}), torch.zeros(1, 1), written(), 0
    for found in drawn(rows, portion):
        store.put([RowFeatures(row, tensor, tensor) for row in found])
    shards = sum(path.stat().st_size for path in folder.glob("shard-*"))
    return written() - before - shards


def written() -> int:
    """Bytes that this process has handed to the system."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def empty(path: Path, rows: int, _: int) -> float:
    import redraft.data.store  # noqa: F401

    return 0.0


DONE: dict[str, Callable[[Path, int, int], float]] = {
    "write": write,
    "write_32": write,
    "open": reopen,
    "open_killed": reopen,
    "read": read,
    "index": index,
    "empty": empty,
}


# -- all of them -------------------------------------------------------------------------------------------------------
def measured(step: str, source: Path, path: Path, rows: int, portion: int) -> dict[str, float]:
    """What a process of its own measures: ``value`` and ``peak_mb``."""
    words = [sys.executable, __file__, "--step", step, str(path), str(rows), str(portion)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source)})
    if done.returncode:
        raise SystemExit(f"{step} of {source}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def turn(sources: dict[str, Path], work: Path, rows: int) -> dict[str, dict[str, dict[str, float]]]:
    """Every step once in both builds, by step and build."""
    found: dict[str, dict[str, dict[str, float]]] = {step: {} for step in STEPS}
    for step in STEPS:
        for build, source in sources.items():
            path = work / f"{build}.jsonl"
            if step == "open_killed":
                (work / f".{path.name}.index").unlink(missing_ok=True)
            portion = 32 if step == "write_32" else FLUSH[build]
            found[step][build] = measured(step, source, path, rows, portion)
            print(f"{step:>12} {build:>6} {found[step][build]}", flush=True)
    texts = [(work / f"{build}.jsonl").read_bytes() for build in sources]
    if texts[0] != texts[1]:
        raise SystemExit("the two builds have written different files")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="src of the older build")
    parser.add_argument("--work", type=Path, help="a folder for the files")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--large", type=int, default=0, help="rows of one more file, of this build alone")
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scale-store.json")
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, path, rows, portion = options.step
        value = DONE[step](Path(path), int(rows), int(portion))
        print(json.dumps({"value": value, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}))
        return
    from redraft import provenance
    from redraft.artifact import atomic_write_json

    work, builds = options.work.absolute(), {"before": options.before.absolute(), "now": ROOT / "src"}
    work.mkdir(parents=True, exist_ok=True)
    turns = []
    for number in range(options.turns):
        order = list(builds)[:: 1 if number % 2 == 0 else -1]
        turns.append(turn({build: builds[build] for build in order}, work, options.rows))
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "rows": options.rows,
        "tokens": {"prompt": PROMPT, "response": RESPONSE},
    }
    for step in STEPS:
        ratios = [each[step]["before"]["value"] / each[step]["now"]["value"] for each in turns]
        result[f"{step}_speedup"] = round(statistics.median(ratios), 2)
        result.setdefault("ratios", {})[step] = [round(ratio, 2) for ratio in ratios]
    for build in builds:
        peaks = {step: max(each[step][build]["peak_mb"] for each in turns) for step in STEPS}
        peaks["empty"] = measured("empty", builds[build], work, 0, 0)["peak_mb"]
        result[f"peaks_mb_{build}"] = {step: round(peak, 1) for step, peak in peaks.items()}
    result["peak_mb"] = max(result["peaks_mb_now"].values())
    result["turns"] = turns
    if options.large:
        path = work / "large.jsonl"
        steps = {step: measured(step, builds["now"], path, options.large, FLUSH["now"]) for step in ("write", "open")}
        (work / f".{path.name}.index").unlink()
        steps["open_killed"] = measured("open_killed", builds["now"], path, options.large, FLUSH["now"])
        steps["read"] = measured("read", builds["now"], path, options.large, FLUSH["now"])
        result["large"] = {"rows": options.large, **steps}
        path.unlink()
    if options.features:
        sizes = {}
        for build, source in builds.items():
            folder = work / f"features-{build}"
            sizes[build] = int(measured("index", source, folder, options.features, SHARD_ROWS)["value"])
        result["index"] = {"rows": options.features, "rows_a_shard": SHARD_ROWS, "bytes": sizes}
    atomic_write_json(options.out, result | {"provenance": provenance.collect(0, "cpu", {})})
    print(json.dumps({key: value for key, value in result.items() if key != "turns"}, indent=1))


if __name__ == "__main__":
    main()
