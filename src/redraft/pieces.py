"""Named tensors that are had piece by piece, so that what is hashed, checked or written need not be in memory whole.

A merged matrix, a table in a file: each is a :class:`Table`, which says type and shape and makes its rows when it is
asked for them. A mapping that holds such is a :class:`Pieced`; to whoever asks it for a tensor it gives the whole one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers of a piece that is made anew.
PIECE = 1 << 22


@dataclass(frozen=True)
class Table:
    """A tensor of this type and shape. ``make`` gives its rows in order, some at a time, on the CPU or elsewhere."""

    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def whole(self) -> Tensor:
        """All of it in memory."""
        return torch.cat(list(self.make()))


class Pieced(Mapping[str, Tensor]):
    """Tensors by name, some of them made piece by piece."""

    @abstractmethod
    def table(self, name: str) -> Table | Tensor:
        """The tensor of this name, unmade where it must be made. Raises ``KeyError``."""

    def __getitem__(self, name: str) -> Tensor:
        return whole(self.table(name))


def table(state: Mapping[str, Tensor], name: str) -> Table | Tensor:
    """A tensor of a mapping of either kind, unmade where it must be made. Raises ``KeyError``."""
    return state.table(name) if isinstance(state, Pieced) else state[name]


def whole(value: Table | Tensor) -> Tensor:
    """All of a tensor."""
    return value.whole() if isinstance(value, Table) else value


def pieces(value: Table | Tensor) -> Iterator[Tensor]:
    """A tensor's numbers in order, as flat contiguous tensors on the CPU: those of a whole one all at once."""
    for piece in value.make() if isinstance(value, Table) else (value,):
        yield piece.detach().cpu().contiguous().reshape(-1)


def in_rows(value: Table | Tensor) -> Iterator[Tensor]:
    """Some rows at a time, at most about ``PIECE`` numbers of a whole tensor."""
    if isinstance(value, Table):
        return value.make()
    return iter(value.split(max(1, PIECE // max(1, value[:1].numel()))))
