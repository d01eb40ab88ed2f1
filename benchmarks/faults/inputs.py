"""Every file that redraft reads, with one thing wrong in it: is it refused in one line, or read as what it says?

    python benchmarks/faults/inputs.py --seed 11 --count 500 --state inputs.jsonl \\
        --out benchmarks/results/faults-inputs.json

In ``reading/``: readers and good files, the changes, and the judge, whose readings know nothing of the package. Every
change is tried in a process of its own, with bounds on time and memory.

Right: ``clear`` (one line that names the file, exit code 2), ``same`` (the outcome of the good file), ``as_written``
(the changed file says something that could be meant, and the reading of this folder agrees on what). Faults:
``tracebacks`` (also a process that died), ``hangs``, ``silent`` (another outcome without a word), ``half`` (refused,
and files of it were left or changed), ``unnamed`` (refused in several lines, or without the name of the file).

The same seed gives the same changes. ``--state`` keeps what was tried: the same command goes on behind it. Exit status
1 where there is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import pkgutil
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutating import commands  # noqa: E402
from mutating.commands import called  # noqa: E402
from mutations import quiet  # noqa: E402

import redraft  # noqa: E402
from faults.reading import changes, judge  # noqa: E402
from faults.reading.base import ROOT, Reader  # noqa: E402
from faults.reading.models import models  # noqa: E402
from faults.reading.stored import stored  # noqa: E402
from faults.reading.texts import texts  # noqa: E402
from redraft.errors import UserError  # noqa: E402
from redraft.files import atomic_write_json  # noqa: E402

SECONDS = 20
MEMORY = 4 << 30  # beyond what the process has at the start
RIGHT = ("clear", "same", "as_written")
FAULTS = ("tracebacks", "hangs", "silent", "half", "unnamed")
ODD = ("odd\nname", "\x1b[31mred", "[bold]x", "%s {0}", "ü 日本", "a 'quoted' \"name\"", "-o", "x" * 120)


# -- one try -----------------------------------------------------------------------------------------------------------
def listing(place: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Every file of a place with a fingerprint; what is no file by its kind."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if name.split("/")[0] in without or path.is_dir() and not path.is_symlink():
            continue
        plain = path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 28
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else str(path.lstat().st_mode)
    return found


def tried(reader: Reader, place: Path) -> tuple[int, str, Any]:
    """Exit code, the line of an error, and the outcome: in this process."""
    call = reader.call(place) if reader.outcome is not None else None
    if call is not None:
        code, said, error = called(call)
        return code, error.strip(), reader.outcome(place, said) if code == 0 and reader.outcome else None
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return 0, "", reader.call(place)
    except UserError as error:
        return 2, f"redraft: error: {error}", None
    except MemoryError:
        return 2, "redraft: error: out of memory", None


def apart(reader: Reader, place: Path) -> dict[str, Any]:
    """What became of a try in a process of its own: ``code``, ``error``, ``outcome``; or ``late``, or ``died``."""
    answer = place.parent / f"{place.name[:20].encode().hex()}.answer"
    began = time.monotonic()
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    child = os.fork()
    if not child:
        try:
            os.setsid()
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 2))
            commands.SECONDS = 24 * 3600  # the time is looked at here, by the load of the machine
            os.chdir(place)
            sys.stdin = open(os.devnull)
            try:
                code, error, outcome = tried(reader, place)
                found = {"code": code, "error": error, "outcome": outcome}
            except Exception as error:
                last = error.__traceback__
                while last and last.tb_next:
                    last = last.tb_next
                where = f"{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last else ""
                found = {"code": 1, "error": f"{type(error).__name__}: {error} ({where})"[:300], "outcome": None}
            answer.write_text(json.dumps(found))
        finally:
            os._exit(0)
    while time.monotonic() - began < SECONDS * busy:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if not answer.exists():
                late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
                return {"late": True} if late else {"died": status}
            found = json.loads(answer.read_text())
            answer.unlink()
            return found
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"late": True}


def judged(
    reader: Reader,
    change: changes.Change,
    file: str,
    place: Path,
    before: dict[str, str],
    found: dict[str, Any],
    base: Any,
) -> tuple[str, str]:
    """The verdict, and why it is a fault."""
    if found.get("late"):
        return "hangs", f"no end in {SECONDS} s"
    if "died" in found:
        return "tracebacks", f"the process died ({found['died']})"
    error = found["error"]
    if found["code"] not in (0, 2) or "Traceback" in error or "defect in" in error:
        return "tracebacks", error[:300]
    if found["code"] == 2:
        left = [name for name in reader.outs if os.path.lexists(place / name)]
        now = listing(place)
        if left or now != before:
            changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
            return "half", f"left {left}, changed {changed}; {error[:200]}"
        if "\n" in error or not error.startswith("redraft: error:") or len(error) > 4000 or not error.isprintable():
            return "unnamed", f"not one line: {error[:300]!r}"
        if not any(name in error for name in (Path(file).name, *reader.names)):
            return "unnamed", f"no name of the file: {error[:300]}"
        return "clear", ""
    if left := [name for name in listing(place, reader.outs) if name.split("/")[-1].startswith(".")]:
        return "half", f"left {left}"
    if json.dumps(found["outcome"]) == json.dumps(base):
        return "same", ""
    allowed = change.allows == changes.OTHER or getattr(reader.confirms, "typed", False)
    if allowed and reader.confirms is not None and reader.confirms(place, found["outcome"]):
        return "as_written", ""
    return "silent", f"{json.dumps(found['outcome'])[:200]} instead of {json.dumps(base)[:200]}"


# -- many tries --------------------------------------------------------------------------------------------------------
def drawn(reader: Reader, rng: random.Random, good: Path) -> tuple[str, changes.Change]:
    """The file of a reader's place that is changed, and how."""
    file = rng.choice(list(reader.files))
    form, path = reader.files[file], good / file
    if form == "bytes" or rng.random() < 0.3:
        return file, changes.whole(rng, path)
    if form == "yaml":
        return file, changes.in_yaml(rng, path)
    if form == "json":
        return file, changes.in_json(rng, path)
    return file, changes.in_lines(rng, path, judge.seal if form == "rows" else None)


class Unsound(Exception):
    """A reader and its judge disagree about good files: nothing can be told of changed ones."""


class Bench:
    """The good places, made once, and what each reader says of its own."""

    def __init__(self, scratch: Path, wanted: str) -> None:
        self.scratch, self.bases = scratch, dict[str, Any]()
        self.readers = [reader for reader in [*texts(), *stored(), *models()] if wanted in reader.name]

    def good(self, reader: Reader) -> Path:
        place = self.scratch / "good" / hashlib.sha256(reader.name.encode()).hexdigest()[:8]
        if not place.exists():
            place.mkdir(parents=True)
            reader.make(place)
        return place

    def base(self, reader: Reader) -> Any:
        """The outcome of the good files; twice, since it must be one."""
        if isinstance(known := self.bases.get(reader.name), Unsound):
            raise known
        if reader.name not in self.bases:
            self.bases[reader.name] = Unsound(f"{reader.name}: it could not be tried")
            found = []
            for number in range(2):
                place = self.scratch / f"base{number}"
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(self.good(reader), place)
                self._settle(reader, place)
                found.append(apart(reader, place))
                if found[-1].get("code") != 0:
                    raise Unsound(f"{reader.name}: the good files are refused: {found[-1]}")
                if reader.confirms is not None and not reader.confirms(place, found[-1]["outcome"]):
                    raise Unsound(f"{reader.name}: the judge reads the good files otherwise: {found[-1]}")
            if found[0]["outcome"] != found[1]["outcome"]:
                raise Unsound(f"{reader.name}: two readings of the good files differ")
            self.bases[reader.name] = found[0]["outcome"]
        return self.bases[reader.name]

    def _settle(self, reader: Reader, place: Path) -> None:
        """Settings that name their own place are written for it."""
        for name, form in reader.files.items():
            if form == "yaml":
                text = (place / name).read_text()
                (place / name).write_text(text.replace(str(self.good(reader)), str(place)))

    def once(self, seed: int, number: int) -> dict[str, Any]:
        """Change number ``number`` of a seed."""
        rng = random.Random(f"{seed}/{number}")
        reader = rng.choices(self.readers, [reader.weight for reader in self.readers])[0]
        odd = "yaml" not in reader.files.values() and rng.random() < 0.1
        place = self.scratch / (rng.choice(ODD) if odd else "place")
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.good(reader), place)
        self._settle(reader, place)
        file, change = drawn(reader, rng, place)
        change.apply(place / file)
        before = listing(place)
        base = self.base(reader)
        began = time.monotonic()
        found = apart(reader, place)
        verdict, why = judged(reader, change, file, place, before, found, base)
        shutil.rmtree(place, ignore_errors=True)
        what = change.what.replace(str(ROOT), "REPOSITORY")
        about = {"reader": reader.name, "file": file, "kind": change.kind, "change": what}
        why = why.replace(str(place), "PLACE").replace(str(self.scratch), "SCRATCH")
        told = {"verdict": verdict, "why": why, "seconds": round(time.monotonic() - began, 2)}
        return {"seed": seed, "number": number, **about, **told}


def warm() -> None:
    """Import the package whole, so that the processes of the tries need not."""
    for found in pkgutil.walk_packages(redraft.__path__, "redraft."):
        with contextlib.suppress(ImportError):  # what is optional and not installed
            importlib.import_module(found.name)


def summary(found: list[dict[str, Any]], mended: set[int]) -> dict[str, Any]:
    """The result file."""

    def counts(some: list[dict[str, Any]]) -> dict[str, int]:
        told = Counter(one["verdict"] for one in some)
        return {"tried": len(some), **{name: told[name] for name in (*RIGHT, *FAULTS)}}

    names = sorted({one["reader"] for one in found})
    seeds = sorted({one["seed"] for one in found})
    faults = [one for one in found if one["verdict"] in FAULTS]
    return {
        **counts(found),
        "by": {name: counts([one for one in found if one["reader"] == name]) for name in names},
        "seeds": {
            str(seed): {"mended_on": seed in mended, **counts([one for one in found if one["seed"] == seed])}
            for seed in seeds
        },
        "faults": [{key: one[key] for key in one if key != "seconds"} for one in faults],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="seed of the changes; repeatable (1)")
    parser.add_argument("--mended", type=int, action="append", help="a seed whose faults were mended; repeatable")
    parser.add_argument("--count", type=int, default=500, help="changes of each seed (500)")
    parser.add_argument("--only", default="", help="only readers with this in their name")
    parser.add_argument("--state", type=Path, help="lines of what was tried; the same command goes on behind it")
    parser.add_argument("--again", action="store_true", help="try those of the state that were faults once more")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so long; the state is kept (600)")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args()
    quiet()
    warm()
    stop = time.monotonic() + 60 * options.minutes
    lines = options.state.read_text().splitlines() if options.state and options.state.exists() else []
    found = {(one["seed"], one["number"]): one for one in map(json.loads, lines)}
    if options.again:
        found = {key: one for key, one in found.items() if one["verdict"] in RIGHT}
    wanted = [(seed, number) for seed in options.seed or [1] for number in range(options.count)]
    unsound = set[str]()
    with tempfile.TemporaryDirectory(prefix="in") as name:
        os.environ |= {"REDRAFT_CACHE": f"{name}/cache", "HF_HUB_OFFLINE": "1"}
        bench = Bench(Path(name), options.only)
        for key in wanted:
            if key in found or time.monotonic() > stop:
                continue
            try:
                found[key] = one = bench.once(*key)
            except Unsound as error:
                unsound.add(str(error)[:1500])
                continue
            if options.state:
                with options.state.open("a") as file:
                    file.write(json.dumps(one) + "\n")
            if one["verdict"] in FAULTS:
                print(json.dumps(one), flush=True)
    result = summary([found[key] for key in wanted if key in found], set(options.mended or ()))
    print(json.dumps({key: value for key, value in result.items() if key not in ("by", "seeds", "faults")}))
    if options.out:
        atomic_write_json(options.out, result)
    for line in sorted(unsound):
        print(f"not tried: {line}")
    sys.exit(bool(result["faults"] or unsound))


if __name__ == "__main__":
    main()
