"""Where a result came from and what it cost.

``collect`` describes the run (command, versions, revision, machine, seed); :class:`Ledger` keeps what each stage
used. Both are plain dictionaries on disk, so that a result file explains itself.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt

from redraft import arithmetic
from redraft.errors import UserError
from redraft.files import atomic_write_json
from redraft.inputs import read_object, there, typed
from redraft.places import installed, without_secrets
from redraft.seals import sealed, unsealed

LEDGER, NEW_LEDGER = "redraft.ledger/1", "remove it to start a new one"
FORWARD_FORMULA = "2 * parameters * tokens"
TRAIN_FORMULA = "6 * trained * tokens + 4 * frozen_on_the_way * tokens"


# -- FLOPs -----------------------------------------------------------------------------------------------------------
def forward_flops(parameters: int, tokens: int) -> int:
    """FLOPs of a forward pass, ``FORWARD_FORMULA``: a multiply and an add a parameter and token.

    ``parameters`` counts those that a token multiplies (no embedding table). Attention's own products are left out:
    they are small against the weights at the lengths met here.
    """
    return 2 * parameters * tokens


def train_flops(trained: int, tokens: int, frozen_on_the_way: int = 0) -> int:
    """FLOPs of a training step, ``TRAIN_FORMULA``: forward 2, gradient of the inputs 2, of the weights 2.

    A frozen weight that gradients pass through (a shared expert beside a trained private one) costs 4 and not 6:
    it has no weight gradient. Weights that no gradient passes belong to :func:`forward_flops`.
    """
    return 6 * trained * tokens + 4 * frozen_on_the_way * tokens


# -- provenance ------------------------------------------------------------------------------------------------------
def collect(seed: int | None = None, device: str | None = None, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """A record of this run for a result file: command line, versions, revision, machine, arithmetic, seed, UTC time.

    ``extra`` is added at the end and wins over the keys collected here.
    """
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": [Path(sys.argv[0]).name, *map(without_secrets, sys.argv[1:])],
        # The build matters (CPU or CUDA) and only torch itself knows it for certain.
        "versions": installed() | {"torch": torch.__version__},
        "revision": revision(),
        "machine": machine(),
        "arithmetic": arithmetic.record(),
        "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "seed": seed,
    }
    return record | (extra or {})


def revision() -> dict[str, Any] | None:
    """Git commit of the checkout that this code runs from, and whether it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changed)}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def machine() -> dict[str, Any]:
    """CPU, threads, memory and GPU of this machine."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
    }
    if torch.cuda.is_available():
        found["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far, and on a GPU the highest allocated there added to it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    if torch.cuda.is_available():
        peak += sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return int(peak)


# -- ledger ----------------------------------------------------------------------------------------------------------
@dataclass
class Entry:
    """What one stage used. ``peak_memory_bytes`` is the process's highest until the stage's end."""

    stage: str
    tokens: NonNegativeInt = 0
    flops: NonNegativeInt = 0
    formula: str = ""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    peak_memory_bytes: NonNegativeInt = 0
    bytes_written: NonNegativeInt = 0

    def add(self, tokens: int = 0, flops: int = 0, formula: str = "", bytes_written: int = 0) -> None:
        """Add to the counts; a stage that uses several formulas lists each once."""
        self.merge(Entry(self.stage, int(tokens), int(flops), formula, bytes_written=int(bytes_written)))

    def merge(self, other: Entry) -> None:
        """Take in the same stage's work of another run of the process: counts add up, memory is the higher."""
        self.tokens += other.tokens
        self.flops += other.flops
        self.bytes_written += other.bytes_written
        self.seconds += other.seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)
        formulas = [*self.formula.split("; "), *other.formula.split("; ")]
        self.formula = "; ".join(dict.fromkeys(filter(None, formulas)))


@dataclass
class Ledger:
    """The cost of every stage, in order. With a ``path`` it is written after every stage, so a kill loses one at most.

    Resuming is loading: a stage that runs again adds to its line, so the sum is what was really spent.
    """

    path: Path | None = None
    stages: list[Entry] = field(default_factory=list)
    run: str = ""  # the mark of the run that it belongs to

    @contextmanager
    def stage(self, name: str) -> Iterator[Entry]:
        """Time the block and note its memory; the entry is kept also when the block fails, for the time was spent.

        Raises ``UserError`` when the ledger cannot be written, but never in the place of what the block raised.
        """
        work = Entry(name)
        began = time.perf_counter()
        try:
            yield work
        except BaseException:
            with suppress(UserError, OSError):
                self._end(work, began)
            raise
        self._end(work, began)

    def _end(self, work: Entry, began: float) -> None:
        work.seconds += time.perf_counter() - began
        work.peak_memory_bytes = max(work.peak_memory_bytes, peak_memory_bytes())
        self.append(work)
        if self.path is not None:
            atomic_write_json(self.path, sealed(self.to_dict(), LEDGER, self.run))

    def append(self, work: Entry) -> None:
        """Add a stage's work, to its own line where the ledger has one."""
        line = next((entry for entry in self.stages if entry.stage == work.stage), None)
        if line is None:
            self.stages.append(work)
        else:
            line.merge(work)

    def to_dict(self) -> dict[str, Any]:
        """{"stages": [...], "total": {...}}; memory's total is the highest."""
        total = Entry("total")
        for entry in self.stages:
            total.merge(entry)
        return {
            "stages": [asdict(entry) for entry in self.stages],
            "total": {k: v for k, v in asdict(total).items() if k not in ("stage", "formula")},
        }

    @classmethod
    def load(cls, path: str | Path, run: str = "") -> Ledger:
        """The ledger at ``path``, or an empty one that will be written there; ``run`` marks whose it is.

        Raises ``UserError`` on damage, and for another run's.
        """
        path = Path(path)
        if not there(path):
            return cls(path, run=run)
        known = {f.name for f in fields(Entry)}
        try:
            stages = unsealed(read_object(path), path, NEW_LEDGER, LEDGER, run)["stages"]
            plain = [{k: v for k, v in entry.items() if k in known} for entry in stages]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a cost ledger ({error}); {NEW_LEDGER}") from error
        return cls(path, typed(list[Entry], plain, f"{path} is not a cost ledger", NEW_LEDGER), run)
