"""Good checkpoints with one thing changed: is each read as what it now says, or refused in one line that names it?

    python benchmarks/mutations.py --seed 1 --seed 2 --seed 3 --count 500 --out benchmarks/results/mutations.json

Sources are the trainers' own checkpoints of the tests, exports of every format, EAGLE-1 drafts, drafts and private
parts of the own format, and a language model as a standalone draft. A mutation changes a key of a config, a tensor, a
map, a file or the folder's name, and carries what must come of it; a forward of this script's own, which knows nothing
of the package, computes what a draft must say. Every 20th goes through the command line too: exit code, one line,
nothing half written.

Verdicts: "refused", "same" (the draft computes what it did), "other" (what the file says now) are right. Faults:
"wrong" (read in silence as something else), "traceback", "late" (no answer in time), "unnamed" (a refusal of several
lines, or one that does not name the thing), "needless" (refused though nothing was wrong). Exit status 1 where there
is one. The same seed gives the same mutations.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mutating import configs, files, language, own, tables
from mutating.base import Mutation
from mutating.commands import commanded
from mutating.judging import FAULTS, RIGHT, checked, judged
from mutating.sources import Source, sources

from redraft.files import atomic_write_json

EVERY = 20


@dataclass
class Tally:
    """What came of all mutations, by kind and verdict, and the faults one by one."""

    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    commands: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)

    def count(self, kind: str, verdict: str) -> None:
        self.kinds.setdefault(kind, Counter())[verdict] += 1

    def total(self, verdict: str) -> int:
        return sum(found[verdict] for found in self.kinds.values())

    def summary(self) -> dict[str, Any]:
        """The result file, without the seeds."""
        rows = {
            kind: {"tried": sum(found.values()), **{verdict: found[verdict] for verdict in (*RIGHT, *FAULTS)}}
            for kind, found in sorted(self.kinds.items())
        }
        return {
            "tried": sum(row["tried"] for row in rows.values()),
            "wrong_in_silence": self.total("wrong"),
            "tracebacks": self.total("traceback"),
            **{verdict: self.total(verdict) for verdict in (*RIGHT, "late", "unnamed", "needless")},
            "commands": {"tried": sum(self.commands.values()), **dict(sorted(self.commands.items()))},
            "kinds": rows,
            "faults": self.faults,
        }


def drawn(found: list[Source], rng: random.Random) -> Iterator[tuple[Source, Mutation]]:
    """Sources and mutations without end: every family of sources and every room of mutations gets its share."""
    groups = {
        "own": [source for source in found if source.own],
        "language": [source for source in found if source.family == "standalone"],
        "others": [source for source in found if not source.own and source.family != "standalone"],
    }
    weights = {name: share for name, share in {"own": 18, "language": 7, "others": 75}.items() if groups[name]}
    while True:
        group = rng.choices(list(weights), list(weights.values()))[0]
        source = rng.choice(groups[group])
        if group == "language":
            room: Any = language
        elif group == "own":
            room = rng.choice([own, own, own, tables, files])
        else:
            room = rng.choices([configs, tables, files], [50, 30, 20])[0]
        yield source, next(room.drawn(source, rng))


def run(found: list[Source], seed: int, count: int, scratch: Path, tally: Tally, every: int = EVERY) -> None:
    """Try ``count`` mutations of this seed; every so many of them by the command line too, none where that is 0."""
    rng = random.Random(seed)
    mutations = drawn(found, rng)
    for number in range(count):
        source, mutation = next(mutations)
        # A place of its own for each: files that were opened may stay mapped.
        place = scratch / f"{seed}-{number}"
        place.mkdir()
        folder = place / "draft"
        shutil.copytree(source.folder, folder)
        moved = mutation.apply(folder)
        folder = moved if isinstance(moved, Path) else folder
        verdict, why = judged(source, mutation, folder)
        tally.count(mutation.kind, verdict)
        fault = {
            "seed": seed,
            "number": number,
            "source": source.name,
            "kind": mutation.kind,
            "mutation": mutation.what,
        }
        if verdict in FAULTS:
            tally.faults.append(fault | {"verdict": verdict, "why": why.replace(str(place), "PLACE")})
        if every and number % every == every - 1:
            for command, verdict, why in commanded(source, mutation, folder, place / "out"):
                tally.commands[verdict] += 1
                if verdict in FAULTS:
                    told = why.replace(str(place), "PLACE")
                    tally.faults.append(fault | {"command": command, "verdict": verdict, "why": told})
        shutil.rmtree(place)


def quiet() -> None:
    """Nothing but the package's own words."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="seed of the mutations; repeatable (1)")
    parser.add_argument("--count", type=int, default=500, help="mutations of each seed (500)")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args()
    quiet()
    seeds, tally = options.seed or [1], Tally()
    with tempfile.TemporaryDirectory() as name:
        os.environ["REDRAFT_CACHE"] = f"{name}/cache"
        found = sources(Path(name) / "sources")
        for source in found:
            checked(source)
        for seed in seeds:
            run(found, seed, options.count, Path(name), tally)
    result = {"seeds": seeds, "count": options.count, "sources": len(found), **tally.summary()}
    for fault in tally.faults:
        print(json.dumps(fault, ensure_ascii=True))
    print(json.dumps({key: value for key, value in result.items() if key not in ("kinds", "faults")}))
    if options.out:
        atomic_write_json(options.out, result)
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
