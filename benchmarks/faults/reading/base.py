"""What a reader is, and the good files that readers begin with.

A reader with a reading of its own (:mod:`faults.reading.judge`) may read a changed file as what it now says; without
one a changed file must be refused or make no difference.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.reading import judge as readings

ROOT = Path(__file__).resolve().parents[3]
RUN = ROOT / "tests" / "artifacts" / "run"
STUDY = ROOT / "benchmarks" / "results" / "selection.json"
Outcome = Any


ASKED = [("What is two and two?", "Four."), ("Name a colour; any", "Blue, é and 日本"), ("Count\nto three", "1, 2, 3")]
MESSAGES = [
    {"id": f"p{n}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for n, (q, a) in enumerate(ASKED)
]


@dataclass(frozen=True)
class Reader:
    """``files`` are those of a place that are changed, and how: ``json``, ``lines``, ``rows``, ``yaml`` or ``bytes``.

    ``call`` gives a command line, or does it itself and gives the outcome. ``outcome`` reads what a command wrote and
    printed; ``confirms`` says whether an outcome is what the files of a place say. ``weight``: how often it is drawn.
    """

    name: str
    files: Mapping[str, str]
    make: Callable[[Path], Any]
    call: Callable[[Path], Any]
    outcome: Callable[[Path, str], Outcome] | None = None
    confirms: Callable[[Path, Outcome], bool] | None = None
    outs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    weight: int = 4


def by(reading: Callable[[Path], Outcome], name: str) -> Callable[[Path, Outcome], bool]:
    """Whether an outcome is what a reading of this folder's own gives of the file.

    Such a reading looks at types itself, so that it may also confirm a value of another kind.
    """

    def confirms(place: Path, found: Outcome) -> bool:
        try:
            return bool(json.dumps(reading(place / name)) == json.dumps(found))
        except (readings.Nothing, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError):
            return False

    confirms.typed = True  # type: ignore[attr-defined]
    return confirms


def files(*names: str) -> Callable[[Path], None]:
    """Copies files and folders of the old run directory."""

    def make(place: Path) -> None:
        for name in names:
            there = RUN / name
            (shutil.copytree if there.is_dir() else shutil.copy)(there, place / there.name)

    return make


def both(*makes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        for one in makes:
            one(place)

    return make


def written(name: str, data: Any) -> Callable[[Path], None]:
    """Writes a file: bytes, a text, or a list of rows as lines of JSON."""

    def make(place: Path) -> None:
        plain = data if isinstance(data, str | bytes) else "".join(json.dumps(row) + "\n" for row in data)
        raw = plain.encode() if isinstance(plain, str) else plain
        (place / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)

    return make
