"""What a checkpoint means to whoever reads it: each value with where it comes from.

A trainer that wrote a draft, an engine that loads it and this project may read one file in different ways, and none of
them says so. A :class:`Reading` is what one of them makes of it: the fields of the draft's config as that reader would
compute them, how each came about, and why the reader stops, if it does. Two readings can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

How = Literal["read", "derived", "defaulted", "target", "dropped"]
"""read: stands in the file. derived: follows from what stands there. defaulted: absent, and the reader's own default is
taken. target: taken from the target. dropped: stands in the file and is not used."""


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of a file, known from the file's header: ``dtype`` as "float32" or "bfloat16", and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One thing that a reader makes of a checkpoint.

    ``what`` is a field of the draft's config (``taps``, ``norm_output``) or the name of a tensor. ``word`` says on
    whose word: "config.json: rope_theta", "vLLM's default", "the shape of fc.weight", "d2t.pt".
    """

    what: str
    value: Any
    how: How
    word: str


@dataclass
class Reading:
    """A checkpoint as ``reader`` ("SpecForge 0.2", "vLLM 0.33") takes it.

    ``meaning`` holds the fields of the draft's config, as that reader computes them, and ``embedding`` ("own",
    "target", "zeros"). ``stops`` are the reader's own reasons to refuse the file, in words; ``silent`` what it computes
    otherwise than the file's author without a word; ``notes`` what whoever uses the draft should know of it. ``mends``
    says by field what sets a value there that the reader does not take from the file.
    """

    reader: str
    meaning: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mends: dict[str, str] = field(default_factory=dict)

    def take(self, what: str, value: Any, how: How, word: str) -> None:
        """Note what was made of one thing; all but tensors and what was dropped is part of the meaning."""
        self.entries.append(Entry(what, value, how, word))
        if how != "dropped" and "." not in what:
            self.meaning[what] = value


@dataclass(frozen=True)
class Difference:
    """A field that two readers take in different ways."""

    what: str
    ours: Any
    theirs: Any


def differences(ours: Reading | Mapping[str, Any], theirs: Reading | Mapping[str, Any]) -> list[Difference]:
    """The fields that both know and take differently, in the order of ``ours``."""
    left, right = (side.meaning if isinstance(side, Reading) else side for side in (ours, theirs))
    return [Difference(what, left[what], right[what]) for what in left if what in right and left[what] != right[what]]
