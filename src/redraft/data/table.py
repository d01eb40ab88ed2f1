"""What is known of the rows of a response file, and where they lie in it.

In memory is what tells rows apart: for each of them where it lies, how many tokens it has, its id and (by number, since
thousands of rows share them) how it was drawn: some 70 bytes. Prompts and responses stay on the disk. Every line's
checksum is compared whenever it is read.

A long file has an *index* beside it, so that it need not be read line by line again. The index says which bytes of the
file it knows by their sha256: where these are others, or there are more behind them, the lines themselves are read. It
is never needed, and losing it costs nothing but time.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import threading
import weakref
import zlib
from array import array
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from redraft.data.lines import MOST_RESTS, REST, Rest, Row, WrongRow, decode_row, quick_line, rest_of, row_key
from redraft.errors import UserError
from redraft.files import replacing
from redraft.inputs import loads, room_of
from redraft.seals import sealed, unsealed

Numbers = npt.NDArray[np.int64]

# A line of more is no response; a file without line breaks is not read into memory whole.
MOST_LINE = 1 << 28
# Shorter files are read line by line in a moment.
INDEXED_FROM = 10_000
INDEX = "redraft.rows/1"
# Rows that were read last are kept up to so many tokens.
RECENT_TOKENS = 1 << 17
# Names that are looked for one by one before they are put in order.
UNSORTED = 1 << 16
AGAIN = "delete it and run the same command again"


class How(NamedTuple):
    """How a row was drawn, but for its seed, which may be another in every row."""

    temperature: float
    top_k: int
    top_p: float
    finish_reason: str
    target_hash: str
    turn: int
    source: str


# -- bytes -------------------------------------------------------------------------------------------------------------
class Bytes:
    """A file that stays open for reading at any place, by several threads and forked processes."""

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        """``file`` is that of the ``path``, where it is open."""
        self.path, self._guard = path, threading.Lock()
        self.file = open_lines(path) if file is None else file
        weakref.finalize(self, self.file.close)

    def at(self, start: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``start`` on. Raises ``UserError`` where the disk refuses."""
        try:
            if hasattr(os, "pread"):
                return os.pread(self.file.fileno(), size, start)
            with self._guard:
                self.file.seek(start)
                return self.file.read(size)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error

    def from_(self, start: int) -> BinaryIO:
        """A reader of all that is behind ``start``; one at a time."""
        self.file.seek(start)
        return self.file

    def line_number(self, place: int) -> int:
        """The number of the line that begins at ``place``, counted from 1."""
        number = 1
        for start in range(0, place, 1 << 20):
            number += self.at(start, min(1 << 20, place - start)).count(b"\n")
        return number


def open_lines(path: Path) -> BinaryIO:
    """A file for reading; of a packed one (``.gz``) its unpacked copy, which goes when it is closed.

    Raises ``UserError``, also for one that unpacks to more than :func:`redraft.inputs.room_of` it.
    """
    try:
        if path.suffix != ".gz":
            return open(path, "rb")
        copy, most = cast(Any, tempfile.TemporaryFile()), room_of(path)
        with gzip.open(path) as packed:
            while piece := packed.read(1 << 20):
                copy.write(piece)
                if copy.tell() > most:
                    raise UserError(f"{path} unpacks to more than {most:,} bytes; unpack and split it")
        copy.flush()
        return copy  # type: ignore[no-any-return]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


# -- the rows of a file ------------------------------------------------------------------------------------------------
# One number a row of each, and of ``ends`` one more; with the type that it has in memory and in the index.
COLUMNS = {"starts": "q", "sizes": "i", "prompts": "i", "responses": "i", "names": "q", "hows": "i", "ends": "q"}


class Table:
    """What is known of every row of a file. ``whole`` counts the bytes of its whole lines, ``seen`` is their sha256;
    ``torn``: a last line is none of them.

    Row ``i`` is the line of ``sizes[i]`` bytes from ``starts[i]`` on, has ``prompts[i]`` and ``responses[i]`` tokens,
    its id between ``ends[i]`` and ``ends[i + 1]`` of ``ids`` and ``known[hows[i]]`` of how it was drawn; ``names[i]``
    is :func:`name_of` its key.
    """

    def __init__(self, path: str | Path, file: BinaryIO | None = None) -> None:
        self.path = Path(path)
        self.bytes = Bytes(self.path, file)
        self.starts, self.names, self.ends = array("q"), array("q"), array("q", [0])
        self.sizes, self.prompts, self.responses, self.hows = array("i"), array("i"), array("i"), array("i")
        self.ids = bytearray()
        self.known: list[How] = []
        self.whole, self.seen, self.torn = 0, hashlib.sha256(), False
        self.places = _Places(self)
        self._numbers: dict[str, int] = {}
        self._numbers_of: dict[bytes, int] = {}
        self._recent: dict[int, Row] = {}
        self._held = 0

    def __len__(self) -> int:
        return len(self.starts)

    # -- one row -------------------------------------------------------------------------------------------------------
    def id(self, index: int) -> str:
        return self.ids[self.ends[index] : self.ends[index + 1]].decode()

    def how(self, index: int) -> How:
        return self.known[self.hows[index]]

    def key(self, index: int) -> str:
        how = self.how(index)
        return row_key(self.id(index), how.temperature, how.turn, how.source)

    def row(self, index: int) -> Row:
        """The row as it is on the disk. Raises ``UserError`` that names the line if it is damaged."""
        row = self._recent.get(index)
        if row is None:
            row = self._read(index)
            self._held += sum(row.sizes)
            if self._held > RECENT_TOKENS:
                self._recent, self._held = {}, sum(row.sizes)
            self._recent[index] = row
        return row

    def _read(self, index: int) -> Row:
        try:
            row = decode_row(self.bytes.at(self.starts[index], self.sizes[index]))
            if row.key != self.key(index):
                raise ValueError(f"row {row.key} stands where {self.key(index)} was")
        except ValueError as error:
            raise UserError(f"{self._place(index)}: {error}; {AGAIN}") from error
        return row

    def _place(self, index: int) -> str:
        return f"{self.path}:{self.bytes.line_number(self.starts[index])}"

    # -- rows that come ------------------------------------------------------------------------------------------------
    def add(self, size: int, id: str, sizes: tuple[int, int], rest: Rest, name: int | None = None) -> None:
        """A row whose line of ``size`` bytes begins where all others end; ``name`` is that of its key, where it is
        known. The bytes are not counted in ``seen``."""
        how = self._number(rest)
        if name is None:
            found = self.known[how]
            name = name_of(row_key(id, found.temperature, found.turn, found.source))
        self.names.append(name)
        self.starts.append(self.whole)
        self.sizes.append(size)
        self.prompts.append(sizes[0])
        self.responses.append(sizes[1])
        self.hows.append(how)
        self.ids += id.encode()
        self.ends.append(len(self.ids))
        self.whole += size

    def pass_over(self, data: bytes) -> None:
        """Count bytes that are no row's behind all that is known."""
        self.whole += len(data)
        self.seen.update(data)

    def _number(self, rest: Rest) -> int:
        """The number in ``known`` of how a row was drawn."""
        number = self._numbers_of.get(rest.text)
        if number is None:
            values = dict(zip(REST, rest.values, strict=True))
            how = How(*(values[name] for name in How._fields))
            number = self._numbers.setdefault(repr(how), len(self.known))
            if number == len(self.known):
                self.known.append(how)
            if len(self._numbers_of) >= MOST_RESTS:
                self._numbers_of.clear()
            self._numbers_of[rest.text] = number
        return number

    def scan(self) -> None:
        """Read the lines behind those that are known, up to a last one that is torn.

        Raises ``UserError`` that names the line for damage anywhere else and for a row that is there twice.
        """
        file, before = self.bytes.from_(self.whole), len(self)
        for line in iter(partial(file.readline, MOST_LINE), b""):
            if line.isspace():
                self.pass_over(line)
                continue
            try:
                if len(line) == MOST_LINE:
                    raise WrongRow(f"more than {MOST_LINE:,} bytes without a line break, which no response has")
                self._take(line)
            except ValueError as error:
                if not line.endswith(b"\n") and not isinstance(error, WrongRow):
                    self.torn = True
                    break
                number = self.bytes.line_number(self.whole)
                raise UserError(f"{self.path}:{number}: {error}; {AGAIN}") from error
        if len(self) > before and (twice := self.places.twice()) is not None:
            first, again = twice
            line_ = self.bytes.line_number(self.starts[first])
            raise UserError(f"{self._place(again)}: row {self.key(again)} is already on line {line_}; delete one")

    def _take(self, line: bytes) -> None:
        """A line that was read. Raises ``ValueError`` for one that is no row."""
        quick = quick_line(line)
        if quick is None:
            row = decode_row(line)
            self.add(len(line), row.id, row.sizes, rest_of(row))
        else:
            self.add(len(line), quick.id, quick.sizes, quick.rest)
        self.seen.update(line)

    # -- the index -----------------------------------------------------------------------------------------------------
    def recall(self) -> None:
        """Take what the index beside the file knows, if the file still begins with the bytes that it was made of."""
        place = index_path(self.path)
        try:
            with safe_open(str(place), "np") as file:
                head = unsealed(loads((file.metadata() or {})["rows"]), place, kind=INDEX)
                columns = {name: file.get_tensor(name) for name in (*COLUMNS, "ids")}
            if columns_digest(columns) != head["columns"]:
                return
            left, seen, data = int(head["bytes"]), hashlib.sha256(), self.bytes.from_(0)
            known = [How(*each) for each in head["known"]]
        except (SafetensorError, UserError, OSError, ValueError, LookupError, TypeError):
            return  # there is none, or none of use
        while left and (piece := data.read(min(left, 1 << 20))):
            seen.update(piece)
            left -= len(piece)
        if left or seen.hexdigest() != head["sha256"]:
            return
        for name, kind in COLUMNS.items():
            setattr(self, name, array(kind, columns[name].tobytes()))
        self.ids, self.known = bytearray(columns["ids"].tobytes()), known
        self._numbers = {repr(how): number for number, how in enumerate(known)}
        self.whole, self.seen = int(head["bytes"]), seen

    def remember(self) -> None:
        """Write the index of all rows that are known. Where the disk does not take it there is none."""
        columns = {name: np.array(getattr(self, name), dtype=kind) for name, kind in COLUMNS.items()}
        columns["ids"] = np.frombuffer(self.ids, dtype=np.uint8).copy()
        head = {"bytes": self.whole, "sha256": self.seen.hexdigest(), "columns": columns_digest(columns)}
        text = json.dumps(sealed(head | {"known": [list(how) for how in self.known]}, INDEX))
        with suppress(UserError), replacing(index_path(self.path)) as new:
            save_file(columns, new, {"rows": text})


def index_path(path: Path) -> Path:
    """The file of the index of a response file, beside it."""
    return path.with_name(f".{path.name}.index")


def columns_digest(columns: dict[str, Any]) -> str:
    """A fingerprint of the columns of a table (16 hex digits)."""
    found = hashlib.sha256()
    for name in (*COLUMNS, "ids"):
        found.update(f"{name}|{columns[name].dtype}|{columns[name].shape}|".encode())
        found.update(columns[name].tobytes())
    return found.hexdigest()[:16]


def name_of(key: str) -> int:
    """A number that stands for the key of a row; two keys share one hardly ever, and are then told apart."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)


class _Places:
    """Where the row of a key is: the names of most rows in order, those of the last ones by themselves."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.sorted: Numbers = np.empty(0, np.int64)
        self.order: Numbers = np.empty(0, np.int64)
        self.recent: dict[int, int] = {}

    def find(self, key: str, name: int) -> int | None:
        """The number of the row of this key, whose :func:`name_of` is ``name``."""
        table = self.table
        for index in range(len(self.order) + len(self.recent), len(table)):
            if len(self.recent) >= UNSORTED or table.names[index] in self.recent:
                self.settle()
                break
            self.recent[table.names[index]] = index
        place = int(np.searchsorted(self.sorted, name))
        while place < len(self.sorted) and self.sorted[place] == name:
            if table.key(int(self.order[place])) == key:
                return int(self.order[place])
            place += 1
        index = self.recent.get(name, -1)
        return index if index >= 0 and table.key(index) == key else None

    def settle(self) -> None:
        """Put all names in order."""
        names = np.array(self.table.names, dtype=np.int64)
        self.order = np.argsort(names, kind="stable")
        self.sorted, self.recent = names[self.order], {}

    def twice(self) -> tuple[int, int] | None:
        """The numbers of the first row that is there already and of the one that it repeats, this one first."""
        self.settle()
        same = np.flatnonzero(self.sorted[1:] == self.sorted[:-1])
        pairs = [(int(self.order[place]), int(self.order[place + 1])) for place in same]
        found = [pair for pair in pairs if self.table.key(pair[0]) == self.table.key(pair[1])]
        return min(found, key=lambda pair: pair[1], default=None)
