"""A decorator registry that finds its entries by importing every module of one package folder.

A new loss, scorer, method or exporter is one new file: it registers itself, and the command line's choices, the
contract tests and the error messages follow.

    LOSSES = Registry("loss", package="redraft.losses")

    @LOSSES.register("kl")
    def kl(...): ...
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from redraft.errors import UserError

T = TypeVar("T", bound=Any)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean NAME?)`` with the known name that is nearest; nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class Registry(Generic[T]):
    """Named entries of one kind. ``kind`` is the word that error messages use; ``package`` is the folder to search.

    Discovery is lazy: the package's modules are imported at the first question, not when the registry is made, so
    the entries may import the module that holds the registry.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._searched = package is None

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its object under ``name`` and returns it as it is.

        Raises ``ValueError`` when another object already has the name: that is a defect of ours, not bad input.
        """

        def file_under(entry: T) -> T:
            if self._entries.setdefault(name, entry) is not entry:
                raise ValueError(f"two entries of the {self.kind} registry are called {name!r}")
            return entry

        return file_under

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self._search()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """The entry called ``name``. Raises ``UserError`` that lists the choices when there is none."""
        self._search()
        if name not in self._entries:
            raise UserError(
                f"unknown {self.kind} {name!r}{nearest(name, self._entries)}; choose one of: {', '.join(self.names())}"
            )
        return self._entries[name]

    def items(self) -> list[tuple[str, T]]:
        """(name, entry) pairs in the order of :meth:`names`."""
        return [(name, self._entries[name]) for name in self.names()]

    def __contains__(self, name: object) -> bool:
        self._search()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def _search(self) -> None:
        if self._searched or self.package is None:
            return
        # Set first: a module under import may itself ask the registry. Undone when an import fails, so that the
        # next question raises the same error and not a misleading "unknown name".
        self._searched = True
        try:
            folder = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(folder.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
        except BaseException:
            self._searched = False
            raise
