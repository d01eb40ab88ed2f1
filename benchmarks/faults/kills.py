"""Runs that are killed again and again, compared with undisturbed ones: same rows, same bits of every tensor.

    python benchmarks/faults/kills.py --work out/kills --state out/kills.jsonl --seed 1 --kills 100 \
        --out benchmarks/results/faults-kills.json

One chain is one run of ``adapt`` (benchmark and page included), ``regenerate``, ``distill`` or ``study`` on a tiny
model, started, killed with -9 and started again up to ``--most`` times, then left to end. A kill comes

- ``time``: at a random moment;
- ``write``: right before or after the n-th time that a file, or the names in a folder, are handed to the disk;
- ``torn``: right before it, with a random part of that file alone on the disk, as after a loss of power;
- ``term``: as SIGTERM at a random moment (exit code 143 and one line);
- ``full``: no kill, but a disk that is full: a small file system in memory (where this script may mount one, else a
  limit on the size of every file), made larger once the run has ended with exit code 2 and one line.

Each counts. ``different`` counts those of chains that end otherwise than an undisturbed run (under ``parts``: in what),
``lost`` and ``doubled`` response rows, ``untold`` ends that are not the exit code and the one line that they should be.
Chains that are done stand in ``--state``: the same command goes on behind them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import rig

from redraft import provenance
from redraft.files import append_text, atomic_write_json

SCHEMA = "redraft.kill/2"
KINDS = ("adapt", "regenerate", "distill", "study")
HOW = ("time", "write", "torn", "term", "full")
SMALL, LARGE = 2 * 2**20, 96 * 2**20


class Disk:
    """A file system of a size in memory, on ``folder``; none where it may not be mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.mounted = self._mount(f"size={LARGE}")

    def _mount(self, options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        try:
            return subprocess.run(words, capture_output=True).returncode == 0
        except OSError:
            return False

    def leave_free(self, size: int) -> None:
        """Make the disk as small as what is on it and ``size`` more."""
        usage = shutil.disk_usage(self.folder)
        self._mount(f"remount,size={usage.used + size}")

    def grow(self) -> None:
        self._mount(f"remount,size={LARGE}")

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], capture_output=True)


class Chains:
    """What all chains share: the world, and undisturbed runs to compare with."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        self.world = rig.make_world(work / "world")
        self.wholes: dict[tuple[str, bool], tuple[rig.Outcome, float, int]] = {}

    def whole(self, kind: str, small: bool) -> tuple[rig.Outcome, float, int]:
        """An undisturbed run's outcome, its seconds, and how often it hands something to the disk.

        ``small``: on the disk that is too small for features to be kept while answers are written.
        """
        if (kind, small) not in self.wholes:
            out, log, count = self.place(f"whole-{kind}", small), self.work / "whole.log", self.work / "count"
            shutil.rmtree(out, ignore_errors=True)
            ended = rig.run(rig.command(kind, self.world, out), log, counted(count))
            if ended.code:
                raise SystemExit(f"an undisturbed {kind} ended with {ended.code}: {ended.said[-600:]}")
            found = rig.outcome(out)
            shutil.rmtree(out)
            self.wholes[kind, small] = found, ended.seconds, int(count.read_text())
        return self.wholes[kind, small]

    def place(self, name: str, small: bool) -> Path:
        return self.disk.folder / name if small else self.work / name

    def chain(self, kind: str, number: int, most: int) -> dict[str, Any]:
        """One chain of at most ``most`` kills; what came of it."""
        order = random.Random(f"{self.seed}/{kind}/{number}")
        small = number % 2 == 1  # every second one on the disk that is filled up
        self.disk = Disk(self.work / "disk") if small else None
        try:
            small = small and self.disk.mounted
            whole, seconds, writes = self.whole(kind, small)
            out = self.place(f"{kind}-{number}", small)
            shutil.rmtree(out, ignore_errors=True)
            found = self._kills(kind, out, order, most, seconds, writes, number % 2 == 1)
            ended = rig.run(rig.command(kind, self.world, out), self.work / "chain.log")
            found["ended"] = ended.code
            if ended.code == 0:
                now = rig.outcome(out)
                found["parts"] = whole.differences(now)
                found |= {"lost": len(whole.rows - now.rows), "doubled": now.doubled + len(now.rows - whole.rows)}
            else:
                found |= {"parts": [f"ended with {ended.code}: {ended.said[-300:]}"], "lost": 0, "doubled": 0}
            if not found["parts"]:
                shutil.rmtree(out, ignore_errors=True)
            return found
        finally:
            if self.disk is not None:
                self.disk.close()

    def _kills(
        self, kind: str, out: Path, order: random.Random, most: int, seconds: float, writes: int, fills: bool
    ) -> dict[str, Any]:
        kills: Counter[str] = Counter()
        untold: list[str] = []
        for _ in range(most):
            how = "full" if fills and order.random() < 0.6 else order.choice(HOW[:4])
            words, log = rig.command(kind, self.world, out), self.work / "chain.log"
            if how in ("time", "term"):
                number = signal.SIGKILL if how == "time" else signal.SIGTERM
                ended = rig.run(words, log, kill_after=order.uniform(0, 0.7 * seconds), with_signal=number)
                wanted = -signal.SIGKILL if how == "time" else 143
            elif how == "full":
                ended, wanted = self._filled(words, log, order), 2
            else:
                edge = order.choice(("before", "after")) if how == "write" else "torn"
                ended = rig.run(words, log, rig.die_at(order.randint(1, max(1, writes // 2)), edge, order.random()))
                wanted = -signal.SIGKILL
            if ended.code == 0:
                break  # it was through before anything happened to it
            kills[how] += 1
            if ended.code != wanted or (wanted > 0 and (len(ended.errors) != 1 or "Traceback" in ended.said)):
                untold.append(f"{how}: exit code {ended.code}: {ended.said[-300:]}")
        return {"kills": dict(kills), "untold": untold}

    def _filled(self, words: list[str], log: Path, order: random.Random) -> rig.Ended:
        """A run on a disk that is full after a while; there is room again afterwards."""
        if not self.disk.mounted:
            return rig.run(words, log, rig.limited(order.randrange(1000, 60_000)))
        # redraft leaves a mebibyte to others, so little more than that is next to nothing
        self.disk.leave_free(2**20 + order.randrange(0, 300_000))
        try:
            return rig.run(words, log)
        finally:
            self.disk.grow()


def counted(path: Path) -> Any:
    """What makes a process count in ``path`` how often it hands something to the disk."""

    def prepare() -> None:
        known, done = os.fsync, [0]

        def fsync(handle: int) -> None:
            known(handle)
            done[0] += 1
            path.write_text(str(done[0]))

        os.fsync = fsync

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--state", type=Path, required=True, help="JSON lines of the chains that are done")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", choices=KINDS, help="of these commands alone")
    parser.add_argument("--kills", type=int, default=100, help="stop when as many are done")
    parser.add_argument("--most", type=int, default=8, help="kills of one chain")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no chain after as many seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rig.prepare()
    began = time.monotonic()
    lines = options.state.read_text().splitlines() if options.state.exists() else []
    done = [found for found in map(json.loads, lines) if found["seed"] == options.seed]
    chains, kinds = Chains(options.work.absolute(), options.seed), options.kind or KINDS
    number = 0
    while tried(done) < options.kills and time.monotonic() - began < options.seconds:
        kind, count = kinds[number % len(kinds)], number // len(kinds)
        number += 1
        if any((found["kind"], found["number"]) == (kind, count) for found in done):
            continue
        about = {"seed": options.seed, "kind": kind, "number": count}
        done.append(about | chains.chain(kind, count, options.most))
        options.state.parent.mkdir(parents=True, exist_ok=True)
        append_text(options.state, json.dumps(done[-1]) + "\n")
        print(f"{tried(done):4} kills; {kind} {count}: {done[-1]}", flush=True)
    result = summary(done, options.seed)
    if options.out is not None:
        atomic_write_json(options.out, result | {"provenance": provenance.collect(options.seed, "cpu")})
    print(json.dumps({key: result[key] for key in ("tried", "different", "lost", "doubled", "untold")}))
    bad = result["different"] or result["lost"] or result["doubled"] or result["untold"]
    sys.exit(1 if bad else 0)


def tried(done: list[dict[str, Any]]) -> int:
    return sum(sum(found["kills"].values()) for found in done)


def summary(done: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The counts over all chains, and by command and kind of kill."""
    by: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for found in done:
        by[found["kind"]].update(found["kills"])
        by[found["kind"]]["chains"] += 1
    wrong = [found for found in done if found["parts"]]
    return {
        "schema": SCHEMA,
        "seed": seed,
        "tried": tried(done),
        "different": sum(sum(found["kills"].values()) for found in wrong),
        "lost": sum(found["lost"] for found in done),
        "doubled": sum(found["doubled"] for found in done),
        "untold": sum(len(found["untold"]) for found in done),
        "by": {kind: dict(counts) for kind, counts in by.items()},
        "faults": [found for found in done if found["parts"] or found["untold"]],
    }


if __name__ == "__main__":
    main()
