"""Damaged run directories: is every damage told in one line that says what to do, or mended to the same end?

    python benchmarks/faults/damage.py --work out/damage --state out/damage.jsonl --seed 1 \
        --out benchmarks/results/faults-damage.json

Every file of a finished run and of one that was killed in its training (``adapt`` and ``distill`` on a tiny model) is
spoilt in turn: one bit flipped (``flip``), the second half cut off (``cut``), taken away (``remove``), put in from
another run (``swap``), or put in as an older version wrote it, without any fingerprint (``old``). Then the same command
is given again. Verdicts:

- ``same``: it ends well, with the rows, weights and figures of an undamaged run;
- ``clear``: it ends with exit code 2 and one line that names the file or its folder;
- ``told``: it ends well with other bits, and a note said so;
- ``traceback``, ``hang``, ``unnamed`` (a refusal that names nothing), ``silent`` (it ends well with other rows, weights
  or figures than an undamaged run, and says nothing): faults.

``mended`` counts those of ``clear`` for which doing what the line says (deleting what it names) and giving the command
once more gave the end of an undamaged run; ``other`` those that ended otherwise. Files that are done stand in
``--state``: the same command goes on behind them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rig

from redraft import provenance
from redraft.artifact import read_tensors, write_tensors
from redraft.features.index import OLD_INDEX
from redraft.files import append_text, atomic_write_json
from redraft.seals import SEAL

SCHEMA = "redraft.damage/1"
KINDS, HOW = ("adapt", "distill"), ("flip", "cut", "remove", "swap", "old")
FAULTS = ("traceback", "hang", "unnamed", "silent")
LONGEST = 300.0
TRAININGS = ("train", "align", "pretrain")


class Runs:
    """A finished and a half-done run of a command, and another run's, to spoil copies of."""

    def __init__(self, work: Path, kind: str, seed: int) -> None:
        self.work, self.kind = work, kind
        self.world, self.other = rig.make_world(work / "world"), rig.make_world(work / "another", 7)
        self.stage = "done"  # what the copy under way is of
        self.out = work / "run"  # every copy lies here: settings name no other place
        self.places = {name: work / f"{kind}-{name}" for name in ("done", "half", "other")}
        if not self.places["other"].exists():
            self._make()
        self.whole = rig.outcome(self.places["done"])

    def command(self) -> list[str]:
        return rig.command(self.kind, self.world, self.out)

    def again(self) -> rig.Ended:
        return rig.run(self.command(), self.work / "damage.log", longest=LONGEST)

    def _make(self) -> None:
        """The three runs; the half-done one is killed when its training has written its third state."""
        for name, world in (("done", self.world), ("other", self.other)):
            shutil.rmtree(self.out, ignore_errors=True)
            ended = rig.run(rig.command(self.kind, world, self.out), self.work / "damage.log")
            if ended.code:
                raise SystemExit(f"an undamaged {self.kind} ended with {ended.code}: {ended.said[-600:]}")
            if name == "done":
                shutil.copytree(self.out, self.places["done"], dirs_exist_ok=True)
            else:
                found = self.out
        half = self.work / "half-run"
        shutil.rmtree(half, ignore_errors=True)
        shutil.move(found, half)
        shutil.rmtree(self.out, ignore_errors=True)
        rig.run(self.command(), self.work / "damage.log", dies_in_training(3))
        shutil.copytree(self.out, self.places["half"], dirs_exist_ok=True)
        shutil.move(half, self.places["other"])

    def files(self, name: str) -> list[str]:
        place = self.places[name]
        return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def dies_in_training(saves: int) -> Any:
    """What makes a process kill itself once its training has written so many states."""

    def prepare() -> None:
        import os
        import signal

        from redraft.training.loop import Checkpoint

        save, left = Checkpoint.save, [saves]

        def dying(self: Checkpoint, *arguments: Any) -> None:
            save(self, *arguments)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpoint.save = dying  # type: ignore[method-assign]

    return prepare


# -- damage ------------------------------------------------------------------------------------------------------------
def spoil(path: Path, how: str, other: Path, order: random.Random) -> bool:
    """Damage a file; false where there is nothing of the kind to do to it."""
    data = path.read_bytes()
    if how == "remove":
        path.unlink()
        return True
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
        return bool(data)
    if how == "flip":
        if not data:
            return False
        place = order.randrange(8 * len(data))
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        return True
    if how == "swap":
        if not other.is_file() or other.read_bytes() == data:
            return False
        shutil.copy(other, path)
        return True
    return aged(path)


def aged(path: Path) -> bool:
    """Make a file what an older version would have written: without seal and fingerprints."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        if value.pop(SEAL, None) is None:
            return False
        path.write_text(json.dumps({key: one for key, one in value.items() if key != "files"}))
        return True
    if path.name == rig.INDEX_FILE:  # one object without fingerprints
        known = rig.read_index(path.parent)
        path.with_name(OLD_INDEX).write_text(json.dumps({"identity": known.identity, "index": known.index}))
        path.unlink()
        return True
    if path.suffix == ".safetensors" and path.parent.name in ("features", *TRAININGS):
        write_tensors(path, {name: tensor.clone() for name, tensor in read_tensors(path).items()})
        return True
    return False


# -- verdicts ----------------------------------------------------------------------------------------------------------
def judged(runs: Runs, stage: str, name: str, how: str, seed: int) -> dict[str, Any] | None:
    """Spoil one file of a copy, give the command again, and say what came of it."""
    shutil.rmtree(runs.out, ignore_errors=True)
    shutil.copytree(runs.places[stage], runs.out)
    runs.stage = stage
    order = random.Random(f"{seed}/{runs.kind}/{stage}/{name}/{how}")
    if not spoil(runs.out / name, how, runs.places["other"] / name, order):
        return None
    ended = runs.again()
    found: dict[str, Any] = {"verdict": verdict(runs, ended, name), "said": "", "mended": None}
    if found["verdict"] not in ("same",):
        found["said"] = (ended.errors or notes(ended) or [ended.said[-300:]])[-1][-400:]
    if found["verdict"] == "clear":
        found["mended"] = mended(runs, ended)
    return found


def verdict(runs: Runs, ended: rig.Ended, name: str) -> str:
    if ended.code is None:
        return "hang"
    if "Traceback" in ended.said or ended.code not in (0, 2):
        return "traceback"
    if ended.code == 2:
        line = ended.errors[-1] if ended.errors else ""
        folder = re.escape(str((runs.out / name).parent))
        named = Path(name).name in line or re.search(rf"{folder}(?![\w./-]*[\w/])", line) is not None
        return "clear" if len(ended.errors) == 1 and named else "unnamed"
    if not changed(runs):
        return "same"
    return "told" if any(name.split("/")[0] in note for note in notes(ended)) else "silent"


def changed(runs: Runs) -> list[str]:
    """Rows, weights and figures that are not an undamaged run's. Nobody reads the states of a training any more that
    had ended."""
    found = runs.whole.differences(rig.outcome(runs.out))
    spent = [name for name in TRAININGS if (runs.places[runs.stage] / f"{name}.json").exists()]
    return [name for name in found if not name.endswith(rig.INDEX_FILE) and Path(name).parent.name not in spent]


def notes(ended: rig.Ended) -> list[str]:
    return [line for line in ended.said.splitlines() if line.startswith("note on")]


def mended(runs: Runs, ended: rig.Ended) -> str:
    """What comes of doing as the line says, up to three times: ``same``, ``other``, or ``stuck``."""
    for _ in range(3):
        line = ended.errors[-1]
        asked = re.search(r"delete (?:the (?:folder|file) )?(\S+?)[,;]? (?:and|to|with|, )", line + " and ")
        said = asked[1] if asked else ""
        first = re.search(rf"{re.escape(str(runs.out))}[^\s:;,]*", line)
        place = Path(said if said.startswith("/") else first[0] if first else "/nowhere")
        line_number = re.search(r"\.jsonl:(\d+):", line)
        if not place.exists():
            return "stuck"
        if line_number and place.is_file():
            lines = place.read_bytes().splitlines(keepends=True)
            place.write_bytes(b"".join(lines[: int(line_number[1]) - 1] + lines[int(line_number[1]) :]))
        elif place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
        ended = runs.again()
        if ended.code == 0:
            return "other" if changed(runs) else "same"
        if ended.code != 2 or not ended.errors:
            return f"ended with {ended.code}"
    return "stuck"


def cases(runs: Runs) -> Iterator[tuple[str, str, str]]:
    for stage in ("half", "done"):  # where more is read again comes first
        for name in runs.files(stage):
            for how in HOW:
                yield stage, name, how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--state", type=Path, required=True, help="JSON lines of the files that are done")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument(
        "--share", type=float, default=1.0, help="how much of all cases is tried, by a draw of the seed"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after as many seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rig.prepare()
    began = time.monotonic()
    lines = options.state.read_text().splitlines() if options.state.exists() else []
    done = [found for found in map(json.loads, lines) if found["seed"] == options.seed]
    known = {(found["kind"], found["stage"], found["file"], found["how"]) for found in done}
    for kind in options.kind or KINDS:
        runs = Runs(options.work.absolute(), kind, options.seed)
        for stage, name, how in cases(runs):
            if (kind, stage, name, how) in known or time.monotonic() - began > options.seconds:
                continue
            if random.Random(f"{options.seed}/{kind}/{stage}/{name}/{how}/share").random() >= options.share:
                continue
            found = judged(runs, stage, name, how, options.seed)
            about = {"seed": options.seed, "kind": kind, "stage": stage, "file": name, "how": how}
            done.append(about | (found or {"verdict": "nothing"}))
            options.state.parent.mkdir(parents=True, exist_ok=True)
            append_text(options.state, json.dumps(done[-1]) + "\n")
            print(json.dumps(done[-1]), flush=True)
    result = summary(done, options.seed)
    if options.out is not None:
        atomic_write_json(options.out, result | {"provenance": provenance.collect(options.seed, "cpu")})
    print(json.dumps({key: value for key, value in result.items() if key not in ("faults", "by")}))
    sys.exit(1 if result["faults"] else 0)


def summary(done: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The counts over all cases, and by kind of damage."""
    tried = [found for found in done if found["verdict"] != "nothing"]
    counts = Counter(found["verdict"] for found in tried)
    by = {how: dict(Counter(found["verdict"] for found in tried if found["how"] == how)) for how in HOW}
    ends = Counter(found["mended"] for found in tried if found.get("mended"))
    return {
        "schema": SCHEMA,
        "seed": seed,
        "tried": len(tried),
        "clear": counts["clear"] + counts["same"] + counts["told"],
        "tracebacks": counts["traceback"],
        "hangs": counts["hang"],
        "silent": counts["silent"],
        "unnamed": counts["unnamed"],
        "verdicts": dict(counts),
        "mended": dict(ends),
        "by": by,
        "faults": [found for found in tried if found["verdict"] in FAULTS],
    }


if __name__ == "__main__":
    main()
