"""What the scripts of this folder share: a tiny world, redraft commands in forked processes, and what a run ends with.

A fork of a process that has everything loaded begins in a few milliseconds, so that hundreds of runs can be killed or
given damaged files in minutes; it runs the command line as it is, and can be killed as any other process.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from redraft.artifact import read_tensors, tensors_hash
from redraft.cli.main import main as command_line
from redraft.data.store import read_rows
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.files import save_draft
from redraft.errors import UserError
from redraft.features import INDEX_FILE, read_index
from redraft.loading import tokenizer_hash
from redraft.seals import SEAL
from redraft.target import Target

ROOT = Path(__file__).resolve().parents[2]
TINY = runpy.run_path(str(ROOT / "tests" / "tiny_models.py"))
WORDS = "one two three four five six seven eight nine ten apples pears boxes cost each are there how many".split()
LONGEST = 600.0
DAMAGED = "damaged"  # stands for the fingerprint of what cannot be read


# -- a tiny world ------------------------------------------------------------------------------------------------------
def make_world(folder: Path, seed: int = 0) -> Path:
    """A random target with a draft for it, prompts, text and the settings of a study; another ``seed``, other ones."""
    if (folder / "study.yaml").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    target = Target(TINY["build_model"]("llama", seed), TINY["build_tokenizer"](), name="tiny", taps=(1, 3, 5))
    target.save(folder / "target")
    meta = {"target": {"name": "tiny", "hash": target.content_hash()}}
    save_draft(
        folder / "draft",
        fresh_draft(target, range(0, 60), seed=1),
        meta | {"tokenizer_hash": tokenizer_hash(target.tokenizer)},
    )
    order = random.Random(seed)
    asked = [{"role": "user", "content": f"{' '.join(order.choices(WORDS, k=5))} {i}"} for i in range(28)]
    lines = [json.dumps({"id": f"p{i}", "messages": [turn]}) + "\n" for i, turn in enumerate(asked)]
    for name, part in (("prompts", lines), ("train", lines[:24]), ("evaluation", lines[24:])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    (folder / "text.txt").write_text("".join(f"{i * (seed + 1)} he sat there and then he sat\n" for i in range(1200)))
    entry = {"target": str(folder / "target"), "draft": str(folder / "draft"), "prompts": str(folder / "train.jsonl")}
    study = {
        "name": "faults",
        "targets": {"t": {**entry, "evaluation": str(folder / "evaluation.jsonl"), "heldout_prompts": 4}},
        "grid": [{"methods": ["fc"], "seeds": [0, 1]}, {"methods": ["full"]}],
        "max_new_tokens": 12,
        "evaluation_tokens": 8,
        "gamma": 3,
        "train": {"epochs": 4, "batch_anchors": 64, "evaluate_every": 2},
        "dtype": "float32",
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder


def command(kind: str, world: Path, out: Path) -> list[str]:
    """The words of a command of this kind that writes ``out``."""
    common: dict[str, Any] = {"target": world / "target", "prompts": world / "prompts.jsonl", "dtype": "float32"}
    if kind == "study":
        return ["study", str(world / "study.yaml"), "--out", str(out)]
    if kind == "regenerate":
        values = common | {"out": out / "r.jsonl", "max-new-tokens": 16, "batch-size": 8}
        return ["regenerate", *flags(values), "--temperature", "0", "--temperature", "0.8"]
    if kind == "adapt":
        values = {"draft": world / "draft", "out": out, "max-new-tokens": 20, "bench-tokens": 10, "bench-prompts": 3}
        values |= {"heldout-prompts": 5, "batch-size": 4, "private-width": 16, "method": "eda", "gamma": 3}
        how = ["epochs=4", "batch_anchors=48", "evaluate_every=2", "save_seconds=0.05"]
        steps = [word for setting in how for word in ("--train", setting)]
        return ["adapt", *flags(common | values), "--budget", "75%", "--exports", "vllm", *steps]
    values = {"text": world / "text.txt", "out": out, "size": 0.9, "heldout-share": 0.4, "layers": 1}
    values |= {"max-new-tokens": 8, "heldout-prompts": 5}
    pre = ["tokens=1024", "length=32", "batch_tokens=128", "heldout_tokens=64", "precision=float32"]
    end = ["epochs=1.0", "batch_anchors=64", "text_length=32", "precision=float32", "evaluate_every=2"]
    steps = [word for name, given in (("pretrain", pre), ("align", end)) for s in given for word in (f"--{name}", s)]
    return ["distill", *flags(common | values), *steps]


def flags(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# -- a command in a forked process -------------------------------------------------------------------------------------
@dataclass
class Ended:
    """How a command ended: exit code (negative for a signal, none where it took too long), what it said, seconds."""

    code: int | None
    said: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.said.splitlines() if line.startswith("redraft: ")]


def run(
    words: list[str],
    log: Path,
    before: Callable[[], None] | None = None,
    kill_after: float | None = None,
    with_signal: int = signal.SIGKILL,
    longest: float = LONGEST,
) -> Ended:
    """Run a command in a fork; ``before`` is called in it first. A signal is sent after ``kill_after`` seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    child = os.fork()
    if not child:
        _child(words, log, before)
    due, deadline, killed = kill_after, longest, False
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - began
        if found:
            code = os.waitstatus_to_exitcode(status)
            return Ended(code, log.read_text(errors="replace"), passed)
        if due is not None and passed >= due and not killed:
            os.kill(child, with_signal)
            killed = True
        if passed >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Ended(None, log.read_text(errors="replace"), passed)
        time.sleep(0.003)


def _child(words: list[str], log: Path, before: Callable[[], None] | None) -> None:
    code: Any = 1
    os.setsid()  # a job of its own for the system, as a command of a shell is
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
        sys.argv = ["redraft", *words]
        if before is not None:
            before()
        try:
            command_line()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        sys.stdout.flush()
    except BaseException as error:  # whatever comes through the command line is a fault
        os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code or 0)


def die_at(number: int, how: str, share: float) -> Callable[[], None]:
    """What makes a process kill itself at its ``number``-th handing of a file to the disk.

    ``how``: ``before`` it, ``after`` it, or ``torn``: before it and with only a ``share`` of the file on the disk, as
    a machine that loses its power would leave it.
    """

    def prepare() -> None:
        known, left = os.fsync, [number]

        def fsync(handle: int) -> None:
            left[0] -= 1
            if left[0] > 0:
                known(handle)
                return
            place = f"/proc/self/fd/{handle}"
            if how == "torn" and os.path.isfile(place):
                os.truncate(place, int(os.path.getsize(place) * share))
            if how == "after":
                known(handle)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        os.fsync = fsync

    return prepare


def limited(most: int) -> Callable[[], None]:
    """What makes every write beyond ``most`` bytes of a file fail in a process, as a quota does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# -- what a run ends with ----------------------------------------------------------------------------------------------
@dataclass
class Outcome:
    """Response rows, tensors and figures of a run, each by name with a fingerprint; rows that are there twice."""

    parts: dict[str, str] = field(default_factory=dict)
    rows: set[str] = field(default_factory=set)
    doubled: int = 0

    def differences(self, other: Outcome) -> list[str]:
        """The names of what is not the same in both."""
        names = self.parts.keys() | other.parts.keys()
        return sorted(name for name in names if self.parts.get(name) != other.parts.get(name))


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def outcome(folder: Path) -> Outcome:
    """What is in a run directory, but for times, machines and what is only on its way."""
    found = Outcome()
    for path in sorted(folder.rglob("*.jsonl")):
        if path.name in ("curve.jsonl", "tops.jsonl", INDEX_FILE) or "failures" in path.name:
            continue
        name, keys = str(path.relative_to(folder)), []
        try:
            rows = read_rows(path)
            for line in path.read_text().splitlines():
                keys.append(json.loads(line).get("id", "") + str(json.loads(line).get("temperature", "")))
        except (UserError, ValueError):
            found.parts[name] = DAMAGED
            continue
        found.doubled += len(keys) - len(set(keys))
        for row in rows:
            found.rows.add(f"{name}:{row.key}")
            found.parts[f"{name}:{row.key}"] = fingerprint(asdict(row))
    for path in sorted(folder.rglob("*.safetensors")):
        name = str(path.relative_to(folder))
        if path.parent.name.startswith("features") or path.name.startswith("state-"):
            continue
        try:
            found.parts[name] = tensors_hash(read_tensors(path))
        except UserError:
            found.parts[name] = DAMAGED
    for path in sorted(folder.rglob(INDEX_FILE)):
        name = str(path.relative_to(folder))
        try:
            index = read_index(path.parent)
            found.parts[name] = fingerprint([sorted(index.index), index.sums])
        except UserError:
            found.parts[name] = DAMAGED
    for path in sorted(folder.rglob("*.json")):
        if (value := figures(path)) is not None:
            found.parts[str(path.relative_to(folder))] = fingerprint(value)
    return found


def figures(path: Path) -> Any:
    """What a result file says that is the same in every run; none of a file that is no result."""
    results = ("selection.json", "train.json", "align.json", "pretrain.json", "bench.json", "results.json")
    if path.name not in (*results, "config.json", "redraft.json"):
        return None
    value = json.loads(path.read_text())
    if path.name not in results:  # what a draft or a run says of itself, but for when and where
        return {key: one for key, one in value.items() if key not in ("provenance", SEAL)}
    if path.name == "selection.json":
        return value["entries"]
    if path.name == "bench.json":
        drafts = value["drafts"].items()
        return {name: [draft["tau_pooled"], draft["rounds"], draft["tokens"]] for name, draft in drafts}
    if path.name == "results.json":
        return [[cell["key"], cell["rounds"], cell.get("heldout")] for cell in value["cells"]]
    return value["history"]


def prepare() -> None:
    """Load what commands load, once and for all forks."""
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import matplotlib.pyplot  # noqa: F401
    import transformers  # noqa: F401

    import redraft.adaptation.adapt
    import redraft.adaptation.distill
    import redraft.adaptation.study.run
    import redraft.api.runs  # noqa: F401
    import redraft.data.regenerate
    import redraft.data.store
    from redraft.cli.main import quiet_libraries

    quiet_libraries()
    # What a long file of responses has, its index and waves, the short ones of this world have too.
    redraft.data.store.INDEXED_FROM, redraft.data.regenerate.WAVE = 4, 20
