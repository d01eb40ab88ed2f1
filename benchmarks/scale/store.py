"""The row store and the index of features at a size, an older build and this one in turns.

    git worktree add out/before REVISION
    python benchmarks/scale/store.py --before out/before/src --work out/scale --rows 200000

A row has 100 prompt tokens and 200 response tokens, drawn evenly from 49,152 ids: 1.9 kB in its file. Every figure is
of a process of its own, in which only the store is imported; the two builds take turns, and the order changes with
every turn. What is measured, in seconds of the clock (``cpu``: of the processor):

- ``write``: ``RowWriter.append`` of all rows, as many at a time as ``redraft regenerate`` of that build hands over (32
  before, 512 now); ``write_32``: 32 at a time in both, each time waiting for the disk. Drawing the rows does not count.
- ``open``: ``RowWriter`` on the whole file, as a resumed run opens it; ``open_lost``: the same without the index, as
  where it was lost (the older build has none: its figure is that of ``open``); ``read``: ``read_rows``, and then every
  token of every row once, in order.
- ``peak_mb``: the highest resident memory of each process, the interpreter and its modules (``empty``) included.
- ``index``: bytes written to the index of a folder of features for ``--features`` rows, 25 to a shard: 256 MB of states
  of a model of 8 billion parameters are the states of about so many rows.

``write``, ``open`` and ``open_lost`` are of ``--rows``, the others, which say nothing new at a size, of ``--few``.
Speed-ups are medians over the turns of the ratio within a turn. Every part is put into the result when it is done, and
every turn; ``also`` in the committed result are two turns of 20,000 rows, of 200,000 there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
STEPS, FEW_STEPS = ("write", "open", "open_lost"), ("write", "write_32", "open", "open_lost", "read")
Times = tuple[float, float]  # of the clock and of the processor


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


def now() -> Times:
    return time.perf_counter(), time.process_time()


def since(began: Times) -> Times:
    ended = now()
    return ended[0] - began[0], ended[1] - began[1]


def write(path: Path, rows: int, portion: int) -> Times:
    from redraft.data.store import RowWriter

    path.unlink(missing_ok=True)
    began, drawing = now(), (0.0, 0.0)
    with RowWriter(path) as writer:
        portions = drawn(rows, portion)
        while True:
            before = now()
            found = next(portions, None)
            took = since(before)
            drawing = drawing[0] + took[0], drawing[1] + took[1]
            if found is None:
                break
            writer.append(found)
    whole = since(began)
    return whole[0] - drawing[0], whole[1] - drawing[1]


def reopen(path: Path, rows: int, _: int) -> Times:
    from redraft.data.store import RowWriter

    began = now()
    with RowWriter(path) as writer:
        took = since(began)
        assert len(writer.rows) == rows
    return took


def read(path: Path, rows: int, _: int) -> Times:
    from redraft.data.store import read_rows

    began = now()
    found = read_rows(path)
    total = sum(row.prompt_ids[0] * 0 + len(row.response_ids) for row in found)
    assert total == RESPONSE * rows
    return since(began)


def index(folder: Path, rows: int, portion: int) -> Times:
    """The bytes that go to the disk beside the shards."""
    import torch

    from redraft.features import FeatureStore, RowFeatures

    store, tensor, before, shards = FeatureStore(folder, {}), torch.zeros(1, 1), written(), 0
    for found in drawn(rows, portion):
        store.put([RowFeatures(row, tensor, tensor) for row in found])
    shards = sum(path.stat().st_size for path in folder.glob("shard-*"))
    return written() - before - shards, 0.0


def written() -> int:
    """Bytes that this process has handed to the system."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def empty(path: Path, rows: int, _: int) -> Times:
    import redraft.data.store  # noqa: F401

    return 0.0, 0.0


def peak() -> float:
    """The highest resident memory of this process in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1000


DONE: dict[str, Callable[[Path, int, int], Times]] = {
    "write": write,
    "write_32": write,
    "open": reopen,
    "open_lost": reopen,
    "read": read,
    "index": index,
    "empty": empty,
}


Found = dict[str, dict[str, dict[str, float]]]


# -- all of them -------------------------------------------------------------------------------------------------------
def measured(step: str, source: Path, path: Path, rows: int, portion: int) -> dict[str, float]:
    """What a process of its own measures: ``seconds`` (of ``index`` bytes), ``cpu`` and ``peak_mb``."""
    words = [sys.executable, __file__, "--step", step, str(path), str(rows), str(portion)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source)})
    if done.returncode:
        raise SystemExit(f"{step} of {source}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def turn(sources: dict[str, Path], work: Path, rows: int, steps: tuple[str, ...]) -> Found:
    """Every step once in both builds, by step and build."""
    found: Found = {step: {} for step in steps}
    for step in steps:
        for build, source in sources.items():
            path = work / f"{build}.jsonl"
            if step == "open_lost" and build == "before":
                found[step][build] = found["open"][build]
                continue
            if step == "open_lost":
                (work / f".{path.name}.index").unlink(missing_ok=True)
            portion = 32 if step == "write_32" else FLUSH[build]
            found[step][build] = measured(step, source, path, rows, portion)
            print(f"{step:>12} {build:>6} {found[step][build]}", flush=True)
    texts = [(work / f"{build}.jsonl").read_bytes() for build in sources]
    if texts[0] != texts[1]:
        raise SystemExit("the two builds have written different files")
    return found


def compared(
    builds: dict[str, Path], work: Path, rows: int, turns: int, steps: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """After every turn the ratios of all so far, their medians, the peaks, and the turns themselves."""
    found: list[Found] = []
    nothing = {build: measured("empty", source, work, 0, 0)["peak_mb"] for build, source in builds.items()}
    for number in range(turns):
        order = list(builds)[:: 1 if number % 2 == 0 else -1]
        found.append(turn({build: builds[build] for build in order}, work, rows, steps))
        yield {"rows": rows, **summary(found, steps, nothing), "turns": found}


def summary(found: list[Found], steps: tuple[str, ...], nothing: dict[str, float]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in ("seconds", "cpu"):
        ratios = {step: [each[step]["before"][name] / each[step]["now"][name] for each in found] for step in steps}
        key = "speedup" if name == "seconds" else "cpu_speedup"
        result |= {f"{step}_{key}": round(statistics.median(ratios[step]), 2) for step in steps}
        result[f"{key}s"] = {step: [round(ratio, 2) for ratio in ratios[step]] for step in steps}
    for build, least in nothing.items():
        peaks = {step: max(each[step][build]["peak_mb"] for each in found) for step in steps} | {"empty": least}
        result[f"peaks_mb_{build}"] = {step: round(peak, 1) for step, peak in peaks.items()}
    return result | {"peak_mb": max(result["peaks_mb_now"].values())}


def indexes(builds: dict[str, Path], work: Path, rows: int) -> dict[str, Any]:
    """What both builds write to the index of a folder of features."""
    sizes = {}
    for build, source in builds.items():
        folder = work / f"features-{build}"
        shutil.rmtree(folder, ignore_errors=True)
        sizes[build] = int(measured("index", source, folder, rows, SHARD_ROWS)["seconds"])
    return {"rows": rows, "rows_a_shard": SHARD_ROWS, "bytes": sizes}


def large(source: Path, work: Path, rows: int) -> dict[str, Any]:
    """A file of this build alone, without one of the older to wait for."""
    path, found = work / "large.jsonl", {}
    for step in ("write", "open", "open_lost", "read"):
        if step == "open_lost":
            (work / f".{path.name}.index").unlink()
        found[step] = measured(step, source, path, rows, FLUSH["now"])
        print(f"{step:>12} {rows:,} {found[step]}", flush=True)
    path.unlink()
    return {"rows": rows, "peak_mb": max(each["peak_mb"] for each in found.values()), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="src of the older build")
    parser.add_argument("--work", type=Path, help="a folder for the files")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--few", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--large", type=int, default=1_000_000, help="rows of one more file, of this build alone")
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scale-store.json")
    parser.add_argument("--part", action="append", choices=("index", "few", "rows", "large"), help="these alone")
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, path, rows, portion = options.step
        seconds, cpu = DONE[step](Path(path), int(rows), int(portion))
        print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mb": peak()}))
        return
    from redraft import provenance
    from redraft.artifact import atomic_write_json

    work, builds = options.work.absolute(), {"before": options.before.absolute(), "now": ROOT / "src"}
    work.mkdir(parents=True, exist_ok=True)
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "index": lambda: iter([{"index": indexes(builds, work, options.features)}]),
        "few": lambda: ({"few": part} for part in compared(builds, work, options.few, options.turns, FEW_STEPS)),
        "rows": lambda: compared(builds, work, options.rows, options.turns, STEPS),
        "large": lambda: iter([{"large": large(builds["now"], work, options.large)}]),
    }
    for name in options.part or parts:
        for part in parts[name]():
            result |= {"schema": SCHEMA, "tokens": {"prompt": PROMPT, "response": RESPONSE}} | part
            result |= {"provenance": provenance.collect(0, "cpu", {})}
            atomic_write_json(options.out, result)
    print(json.dumps({key: value for key, value in result.items() if key not in ("turns", "few")}, indent=1))


if __name__ == "__main__":
    main()
