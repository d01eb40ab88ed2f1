"""The record of a selection: every row's score and rank, whether it is in, and why."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from redraft.artifact import atomic_write_json, read_json
from redraft.errors import UserError
from redraft.selection import ScorableRow
from redraft.shown import Shown, lines

SCHEMA = "redraft.selection/1"
RowT = TypeVar("RowT", bound=ScorableRow)


@dataclass(frozen=True)
class Entry:
    """One row's fate. ``rank`` 1 is the top; ``tokens`` is what the row counts towards a budget of tokens."""

    key: str
    score: float
    rank: int
    tokens: int
    selected: bool
    reason: str


@dataclass(frozen=True)
class Manifest(Shown):
    """A selection and all that led to it. ``entries`` are in the order of rank."""

    scorer: str
    settings: dict[str, Any]
    budget: dict[str, Any]
    order: str
    source: str | None
    source_sha256: str | None
    entries: list[Entry]

    @property
    def selected_keys(self) -> list[str]:
        """Keys of the selected rows, best first."""
        return [entry.key for entry in self.entries if entry.selected]

    @property
    def selected_tokens(self) -> int:
        return sum(entry.tokens for entry in self.entries if entry.selected)

    def __rich__(self) -> Any:
        kept, total = len(self.selected_keys), len(self.entries)
        return lines(f"{kept} of {total} rows kept ({self.selected_tokens:,} tokens) by {self.scorer}")

    def apply(self, rows: Sequence[RowT]) -> list[RowT]:
        """The selected ones of ``rows``, in their own order. Raises ``UserError`` when a selected row is missing."""
        chosen = set(self.selected_keys)
        missing = sorted(chosen - {row.key for row in rows})
        if missing:
            raise UserError(
                f"{len(missing)} selected rows are not in the data, first {missing[0]}; "
                "the manifest belongs to other data: select again"
            )
        return [row for row in rows if row.key in chosen]

    def check_source(self, path: str | Path) -> None:
        """Raise ``UserError`` unless ``path`` is the file, unchanged, that the selection was made from."""
        if self.source_sha256 is not None and file_hash(path) != self.source_sha256:
            raise UserError(f"{path} is not the file that this selection was made from; select again")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with totals for a reader's eye."""
        head = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "entries"}
        totals = {
            "rows": len(self.entries),
            "tokens": sum(entry.tokens for entry in self.entries),
            "selected_rows": len(self.selected_keys),
            "selected_tokens": self.selected_tokens,
        }
        return {"schema": SCHEMA, **head, "totals": totals, "entries": [asdict(entry) for entry in self.entries]}

    def write(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all. Raises ``UserError`` when the disk cannot take it."""
        atomic_write_json(path, self.to_dict())


def read_manifest(path: str | Path) -> Manifest:
    """Read what :meth:`Manifest.write` wrote. Raises ``UserError`` when the file is missing, damaged or another's."""
    found = read_json(path)
    if found.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a selection manifest (schema {found.get('schema')!r}, expected {SCHEMA!r})")
    try:
        entries = [Entry(**{field.name: entry[field.name] for field in fields(Entry)}) for entry in found["entries"]]
        head = {field.name: found[field.name] for field in fields(Manifest) if field.name != "entries"}
        sound = all(_sound(entry) for entry in entries)
        ordered = [entry.rank for entry in entries] == list(range(1, len(entries) + 1))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); select again") from error
    if not (sound and ordered):
        raise UserError(f"{path} is damaged: its entries are not what redraft writes; select again")
    return Manifest(**head, entries=entries)


def _sound(entry: Entry) -> bool:
    types = isinstance(entry.key, str) and isinstance(entry.reason, str) and isinstance(entry.selected, bool)
    return types and isinstance(entry.tokens, int) and entry.tokens > 0 and math.isfinite(entry.score)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes in hex. Raises ``UserError`` when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
