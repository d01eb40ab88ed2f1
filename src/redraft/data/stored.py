"""The rows of a response file as a sequence that reads one when it is looked at: many fit into little memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from redraft.data.lines import Row, encoded
from redraft.data.table import How, Numbers, Table, name_of
from redraft.files import write_error


class StoredRow(Row):
    """A row of a file. Its key, sizes and how it was drawn are in memory, the rest is read when it is asked for, which
    raises ``UserError`` that names the line where it is damaged."""

    __slots__ = ("_at", "_id", "_table")
    _table: Table
    _at: int
    _id: str | None

    def __new__(cls, *place: Any, **fields: Any) -> Any:
        """What is made of it by ``dataclasses.replace`` is a row in memory."""
        return Row(**fields) if fields else object.__new__(cls)

    def __init__(self, table: Table, at: int, id: str | None = None) -> None:
        for name, value in (("_table", table), ("_at", at), ("_id", id)):
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        return Row, tuple(getattr(self, field.name) for field in fields(Row))

    def called(self, id: str) -> Row:
        return StoredRow(self._table, self._at, id)

    @property
    def sizes(self) -> tuple[int, int]:
        return self._table.prompts[self._at], self._table.responses[self._at]

    # fields that are in memory
    id = property(lambda self: self._table.id(self._at) if self._id is None else self._id)
    temperature = property(lambda self: self._table.how(self._at).temperature)
    top_k = property(lambda self: self._table.how(self._at).top_k)
    top_p = property(lambda self: self._table.how(self._at).top_p)
    finish_reason = property(lambda self: self._table.how(self._at).finish_reason)
    target_hash = property(lambda self: self._table.how(self._at).target_hash)
    turn = property(lambda self: self._table.how(self._at).turn)
    source = property(lambda self: self._table.how(self._at).source)
    # fields that are on the disk
    prompt_ids = property(lambda self: self._table.row(self._at).prompt_ids)
    response_ids = property(lambda self: self._table.row(self._at).response_ids)
    seed = property(lambda self: self._table.row(self._at).seed)


class Rows(Sequence[Row]):
    """The rows of a file, or some of them, in an order; each is read when it is looked at."""

    def __init__(self, table: Table, which: Numbers | None = None) -> None:
        self.table, self.which = table, which

    def __len__(self) -> int:
        return len(self.table) if self.which is None else len(self.which)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return Rows(self.table, self._which[index])
        place = range(len(self))[index]
        return StoredRow(self.table, place if self.which is None else int(self.which[place]))

    def __iter__(self) -> Iterator[Row]:
        places = range(len(self.table)) if self.which is None else map(int, self.which)
        return (StoredRow(self.table, place) for place in places)

    def __eq__(self, other: object) -> bool:
        """Whether the same rows stand here in the same order."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def _which(self) -> Numbers:
        return np.arange(len(self.table)) if self.which is None else self.which

    @property
    def prompt_tokens(self) -> Numbers:
        """Tokens of each prompt."""
        return np.array(self.table.prompts, dtype=np.int64)[self._which]

    @property
    def response_tokens(self) -> Numbers:
        """Tokens of each response."""
        return np.array(self.table.responses, dtype=np.int64)[self._which]

    @property
    def hows(self) -> list[How]:
        """The different ways in which these rows were drawn."""
        return [self.table.known[number] for number in np.unique(np.array(self.table.hows)[self._which])]

    def where(self, chosen: npt.NDArray[np.bool_]) -> Rows:
        """Those of the rows, in their order, of which ``chosen`` says so."""
        return Rows(self.table, self._which[chosen])

    def get(self, key: str) -> Row | None:
        """The row of this key anywhere in the file."""
        place = self.table.places.find(key, name_of(key))
        return None if place is None else StoredRow(self.table, place)


def spooled(rows: Iterable[Row]) -> Rows:
    """These rows in a file without a name that goes with them. Raises ``UserError`` for want of room."""
    folder = Path(tempfile.gettempdir())
    try:
        file: Any = tempfile.TemporaryFile(buffering=1 << 20)
        table = Table(folder / "rows", file)
        for row in rows:
            line, rest = encoded(row)
            file.write(line)
            table.add(len(line), row.id, row.sizes, rest)
        file.flush()
    except OSError as error:
        raise write_error(folder / "rows", error) from error
    return Rows(table)
