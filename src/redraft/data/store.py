"""Responses on disk: JSON lines, one response a line, append-only, each with a checksum.

A row keeps the token ids as the engine produced them; nothing is ever tokenised again. A killed run leaves at most
one torn line at the end of the file, which the next writer cuts off. Damage anywhere else is an error that names
the file and the line. See docs/formats.md.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from redraft.artifact import atomic_write_text, require_free_space
from redraft.errors import UserError

try:
    import fcntl
except ImportError:  # not a Unix: two writers are then not kept apart
    fcntl = None  # type: ignore[assignment]

FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True)
class Row:
    """One response of the target. ``turn`` counts the user turns of its conversation from 0."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    finish_reason: str
    target_hash: str
    turn: int = 0

    @property
    def key(self) -> str:
        """The unique name of this row in its file."""
        return row_key(self.id, self.temperature, self.turn)


def row_key(id: str, temperature: float, turn: int = 0) -> str:
    """``id@T<temperature>``, with ``#<turn>`` behind it for every turn but the first."""
    return f"{id}@T{temperature:g}" + (f"#{turn}" if turn else "")


def checksum(fields: dict[str, Any]) -> str:
    """First 16 hex digits of the sha256 of the row's canonical JSON (sorted keys, no blanks, no checksum)."""
    plain = {key: value for key, value in fields.items() if key != "checksum"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_row(row: Row) -> bytes:
    """The line of a row, with its checksum and the line break."""
    value = asdict(row)
    return (json.dumps(value | {"checksum": checksum(value)}, separators=(",", ":")) + "\n").encode()


def decode_row(line: bytes) -> Row:
    """The row of a line. Raises ``ValueError`` that says what is wrong with it."""
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    names = [field.name for field in fields(Row)]
    missing = [name for name in [*names, "checksum"] if name not in value]
    if missing:
        raise ValueError(f"no {', '.join(missing)}; this is no line of a response file")
    if checksum(value) != value["checksum"]:
        raise ValueError("the checksum does not fit")
    row = Row(**{name: value[name] for name in names})
    if row.finish_reason not in FINISH_REASONS or not row.prompt_ids or not row.response_ids:
        raise ValueError(f"an empty prompt or response, or the unknown finish reason {row.finish_reason!r}")
    return row


def _scan(data: bytes, where: str | Path) -> tuple[list[Row], int]:
    """The rows in ``data`` and the number of bytes that are whole; only the last line may be torn."""
    rows: list[Row] = []
    lines: dict[str, int] = {}
    start = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if line.strip():
            try:
                row = decode_row(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return rows, start
                raise UserError(f"{where}:{number}: {error}; delete it and run the same command again") from error
            if row.key in lines:
                raise UserError(f"{where}:{number}: row {row.key} is already on line {lines[row.key]}; delete one")
            lines[row.key] = number
            rows.append(row)
        start += len(line)
    return rows, start


def read_rows(path: str | Path) -> list[Row]:
    """Every row of a response file (``.jsonl`` or ``.jsonl.gz``), in file order. A torn last line is left out.

    Raises ``UserError`` when the file is missing or empty, and with the line number when a line is damaged or a
    row is there twice.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; name a response file that `redraft regenerate` wrote") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows, _ = _scan(data, path)
    if not rows:
        raise UserError(f"{path} holds no responses; run `redraft regenerate` again")
    return rows


class RowWriter:
    """Appends rows to a file; use it in a ``with`` block.

    Opening makes the file where there is none and cuts a torn last line off; ``rows`` are those already there. Each
    :meth:`append` is on the disk when it returns. Raises ``UserError`` when the file cannot be written, is damaged,
    or is being written by another process.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.keys: set[str] = set()
        self.rows: list[Row] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(self.path, "ab+", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        try:
            self._lock()
            self._recover()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{self.path} is being written by another process; wait for it or stop it") from error

    def _recover(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        self.rows, whole = _scan(data, self.path)
        if whole < len(data):
            self._file.truncate(whole)
        if data[:whole] and not data[:whole].endswith(b"\n"):
            self._file.write(b"\n")  # the last row is whole and only its line break was lost
        os.fsync(self._file.fileno())
        self.keys = {row.key for row in self.rows}

    def append(self, rows: Sequence[Row]) -> None:
        """Write a batch of rows. Raises ``UserError`` when the disk is full, ``ValueError`` for a key that is there."""
        if not rows:
            return
        data = bytearray()
        for row in rows:
            if row.key in self.keys:
                raise ValueError(f"row {row.key} is already stored")
            self.keys.add(row.key)
            data += encode_row(row)
        require_free_space(self.path.parent, len(data))
        try:
            view = memoryview(bytes(data))
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; what was written is kept") from error
        self.rows.extend(rows)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Failure:
    """A response that could not be had, by the key its row would have, and why.

    ``permanent`` is false where asking again later may help.
    """

    key: str
    reason: str
    permanent: bool = True


def failures_path(path: str | Path) -> Path:
    """``<name>.failures.jsonl`` beside the response file ``<name>.jsonl``."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.failures.jsonl")


def write_failures(path: str | Path, failures: Iterable[Failure]) -> None:
    """Replace the list of failures beside the response file ``path``; an empty list removes it."""
    place = failures_path(path)
    text = "".join(json.dumps(asdict(failure)) + "\n" for failure in failures)
    if text:
        atomic_write_text(place, text)
    else:
        place.unlink(missing_ok=True)


def read_failures(path: str | Path) -> list[Failure]:
    """The failures listed beside the response file ``path``; empty when there are none."""
    place = failures_path(path)
    if not place.exists():
        return []
    try:
        return [Failure(**json.loads(line)) for line in place.read_text().splitlines() if line.strip()]
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"cannot read {place}: {error}; delete it and run the same command again") from error
