"""What a mutation is: one change of a good checkpoint, and what must come of it.

JSON is written here as no library would: with numbers beyond what Python holds, values nested thousands deep, a key
that stands twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

# What code in a file says when it is run.
RAN = "ran!"

Path_ = tuple[str, ...]
"""Keys from the top of a JSON object to a value."""


@dataclass(frozen=True)
class Change:
    """A meaning that differs from the source's: ``fields`` of the draft's config, and ``tensors`` by the package's
    names, none where one is gone."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Expect:
    """What may come of a mutation: to be refused, or to mean one of ``reads``.

    ``noted``: where it is read, a note must hold one of these words: what was taken is a choice between two.
    """

    refuse: bool
    reads: tuple[Change, ...] = ()
    noted: tuple[str, ...] = ()


REFUSE = Expect(True)
SAME = Expect(False, (Change(),))
# Whoever cannot tell may say so; who tells must be right.
EITHER = Expect(True, (Change(),))


def becomes(**fields: Any) -> Expect:
    """It must be read as a draft with these fields."""
    return Expect(False, (Change(fields),))


def may_become(**fields: Any) -> Expect:
    """As :func:`becomes`, or refused."""
    return Expect(True, (Change(fields),))


@dataclass(frozen=True)
class Mutation:
    """``apply`` does to a copy of the source's folder what ``what`` says, and says where it lies if that is elsewhere
    now; a refusal must hold one of ``names``."""

    kind: str
    what: str
    apply: Callable[[Path], Any]
    names: tuple[str, ...]
    expect: Expect


# -- JSON that no library writes ---------------------------------------------------------------------------------------
class Raw:
    """A piece of JSON, as it is to stand in the file; ``shown`` is what it is called."""

    def __init__(self, text: str, shown: str = "") -> None:
        self.text, self.shown = text, shown or text

    def __repr__(self) -> str:
        return self.shown


NAN, INFINITY, BEYOND = Raw("NaN"), Raw("-Infinity"), Raw("1e400")
DEEP = Raw("[" * 2000 + "]" * 2000, "2,000 lists in each other")
DEEP_OBJECT = Raw('{"a":' * 2000 + "1" + "}" * 2000, "2,000 objects in each other")
DIGITS = Raw("9" * 5000, "a number of 5,000 digits")


def dumped(values: Any) -> str:
    """JSON with the pieces of :class:`Raw` in their places."""
    pieces: list[str] = []

    def marked(value: Any) -> str:
        assert isinstance(value, Raw), value
        pieces.append(value.text)
        return f"@{len(pieces) - 1}@"

    text = json.dumps(values, indent=2, default=marked)
    for number, piece in enumerate(pieces):
        text = text.replace(f'"@{number}@"', piece)
    return text


def found(values: Any, path: Path_) -> Any:
    """The value at ``path``; none where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def rewritten(file: str, path: Path_, value: Any) -> Callable[[Path], None]:
    """Puts ``value`` at ``path`` of a JSON file; :data:`GONE` takes out what is there."""

    def apply(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        inner = values
        for key in path[:-1]:
            if not isinstance(inner.get(key), dict):
                inner[key] = {}
            inner = inner[key]
        if value is GONE:
            inner.pop(path[-1], None)
        else:
            inner[path[-1]] = value
        (folder / file).write_text(dumped(values))

    return apply


GONE = object()


def doubled(file: str, key: str, value: Any) -> Callable[[Path], None]:
    """Puts ``key`` a second time, with this value, at the head of the JSON file: readers take the last."""

    def apply(folder: Path) -> None:
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace("{", f"{{{json.dumps(key)}: {dumped(value)},", 1))

    return apply


def shown(value: Any) -> str:
    """A value in a few words."""
    text = "nothing" if value is GONE else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
