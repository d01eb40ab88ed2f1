"""Responses on disk: JSON lines, one response a line, append-only, each with a checksum.

A row keeps the token ids as the engine produced them; nothing is ever tokenised again. A killed run leaves at most
one torn line at the end of the file, which the next writer cuts off. Damage anywhere else is an error that names
the file and the line. See docs/formats.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

# A response file is of rows; whoever opens one knows them.
from redraft.data.lines import CONTEXT_FULL as CONTEXT_FULL
from redraft.data.lines import FINISH_REASONS as FINISH_REASONS
from redraft.data.lines import REFERENCE as REFERENCE
from redraft.data.lines import TARGET as TARGET
from redraft.data.lines import TRAFFIC as TRAFFIC
from redraft.data.lines import UNKNOWN as UNKNOWN
from redraft.data.lines import Row as Row
from redraft.data.lines import decode_row as decode_row
from redraft.data.lines import encode_row as encode_row
from redraft.data.lines import encoded
from redraft.data.lines import row_key as row_key
from redraft.data.stored import Rows as Rows
from redraft.data.stored import spooled as spooled
from redraft.data.table import INDEXED_FROM, Table, index_path, name_of
from redraft.errors import UserError
from redraft.files import append, atomic_write_text, replacing, require_free_space, sync, use_folder, write_error
from redraft.inputs import require_file
from redraft.locks import is_helper, lock

try:
    import fcntl
except ImportError:  # not a Unix: two writers are then not kept apart
    fcntl = None  # type: ignore[assignment]


def read_rows(path: str | Path) -> Rows:
    """Every row of a response file (``.jsonl`` or ``.jsonl.gz``), in file order, each read when it is looked at.

    Raises ``UserError`` when the file is missing or empty, and by its number for a line that is damaged or there twice,
    also for a last one that is torn: the writer of the file cuts it off and writes it anew (:class:`RowWriter`).
    """
    require_file(path, "name a response file that `redraft regenerate` wrote")
    table = Table(path)
    table.recall()
    table.scan()
    if table.torn:
        raise UserError(
            f"{path}:{table.bytes.line_number(table.whole)}: the last line is torn, as a killed run leaves it; give "
            "the command that wrote the file again, or delete the line"
        )
    if not len(table):
        raise UserError(f"{path} holds no responses; run `redraft regenerate` again")
    return Rows(table)


def write_rows(path: str | Path, rows: Sequence[Row]) -> int:
    """Make a response file of these rows and no others, whole or not at all; the bytes written.

    A file that holds them already is left as it is. Raises ``UserError`` when the disk cannot hold it.
    """
    path, wanted, size = Path(path), hashlib.sha256(), 0
    for row in rows:
        line = encode_row(row)
        wanted.update(line)
        size += len(line)
    if path.is_file():
        with open(path, "rb") as there:
            if hashlib.file_digest(there, "sha256").digest() == wanted.digest():
                return 0
    require_free_space(path.parent, size)
    with replacing(path) as new, open(new, "wb") as file:
        file.writelines(map(encode_row, rows))
    return size


class RowWriter:
    """Appends rows to a file; use it in a ``with`` block.

    Opening makes the file where there is none and cuts a torn last line off; ``rows`` are those already there. Each
    :meth:`append` is on the disk when it returns. Raises ``UserError`` when the file cannot be written, is damaged,
    or is being written by another process.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        use_folder(self.path.parent)
        self._lock = None if is_helper() else lock(lock_path(self.path), f"response file {self.path}")
        try:
            self._new = not self.path.exists()
            if self._new:
                index_path(self.path).unlink(missing_ok=True)  # of a file that was here before
            self._file: BinaryIO = open(self.path, "ab+", buffering=0)
            try:
                self._recover()
            except BaseException:
                self._file.close()
                raise
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise write_error(self.path, error) from error
            raise

    def _recover(self) -> None:
        try:
            if fcntl is not None:  # older versions take no other lock
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path} is being written by another process; wait for it or stop it") from error
        except OSError:
            pass  # a file system without locks, which taking ours has told
        self._table = Table(self.path)
        self.rows = Rows(self._table)
        self._table.recall()
        self._remembered, before = self._table.whole, len(self.rows)
        self._table.scan()
        whole = self._table.whole
        if self._table.torn:
            self._file.truncate(whole)
        if whole and self._table.bytes.at(whole - 1, 1) != b"\n":
            self._file.write(b"\n")  # the last row is whole and only its line break was lost
            self._table.pass_over(b"\n")
        os.fsync(self._file.fileno())
        sync(self.path.parent)
        # not of processes that train together: the first of them does it for all
        self._next = math.inf if self._lock is None else max(INDEXED_FROM, before * 3 // 2)

    def append(self, rows: Sequence[Row]) -> None:
        """Write a batch of rows, all or none. Raises ``UserError`` when the disk is full, ``ValueError`` for a key that
        is there."""
        if not rows:
            return
        table, keys = self._table, [row.key for row in rows]
        names = list(map(name_of, keys))
        again = {key for key, name in zip(keys, names, strict=True) if table.places.find(key, name) is not None}
        if len({*keys}) < len(keys):
            again |= {key for key, count in Counter(keys).items() if count > 1}
        if again:
            raise ValueError(f"row {min(again)} is already stored")
        lines, rests = zip(*map(encoded, rows), strict=True)
        data = b"".join(lines)
        require_free_space(self.path.parent, len(data))
        try:
            append(self._file, data)
        except OSError as error:
            raise write_error(self.path, error) from error
        for row, line, rest, name in zip(rows, lines, rests, names, strict=True):
            table.add(len(line), row.id, row.sizes, rest, name)
        table.seen.update(data)
        if len(table) >= self._next:
            self._remember()

    def _remember(self) -> None:
        """Write the index; again when there are half as many rows more, or at the end: what is killed in between has
        the last third to read line by line."""
        self._table.remember()
        self._remembered, self._next = self._table.whole, max(INDEXED_FROM, len(self.rows) * 3 // 2)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._new and not self.rows and any(error):
            self.path.unlink(missing_ok=True)  # what was refused before its first row leaves nothing
        elif len(self.rows) >= INDEXED_FROM and self._table.whole != self._remembered and self._lock is not None:
            self._remember()
        self._file.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def lock_path(path: Path) -> Path:
    """The file of the lock on a response file, beside it."""
    return path.with_name(f".{path.name}.lock")


@dataclass(frozen=True)
class Failure:
    """A response that could not be had, by the key its row would have, and why; ``permanent`` unless asking may
    help."""

    key: str
    reason: str
    permanent: bool = True


def failures_path(path: str | Path) -> Path:
    """``<name>.failures.jsonl`` beside the response file ``<name>.jsonl``."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.failures.jsonl")


def write_failures(path: str | Path, failures: Iterable[Failure]) -> None:
    """Replace the list of failures beside the response file ``path``; an empty list removes it."""
    if text := "".join(json.dumps(asdict(failure)) + "\n" for failure in failures):
        atomic_write_text(failures_path(path), text)
    else:
        failures_path(path).unlink(missing_ok=True)
