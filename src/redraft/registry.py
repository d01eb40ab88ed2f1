"""Named entries of one kind, each in a file of its own that registers itself.

    LOSSES = Registry("loss", variable="LOSSES", packages=("redraft.losses",))

    @LOSSES.register("kl")
    def kl(...): ...

Which names there are is read from the text of the packages' files, and a file is imported when its entry is asked for:
help and error messages list every choice without importing torch. So the registration stands at the beginning of a
line, after the registry's variable, with the name written out.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from redraft.errors import UserError

T = TypeVar("T", bound=Any)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean NAME?)`` with the known name that is nearest; nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class Registry(Generic[T]):
    """Named entries of one kind.

    ``kind`` is the word that error messages use. ``packages`` are searched, folders in them too, for files that
    register with ``variable``. ``more`` is called before names are listed or one is not found, and may register
    further entries (plugins).
    """

    def __init__(
        self, kind: str, variable: str = "", packages: tuple[str, ...] = (), more: Callable[[], None] | None = None
    ) -> None:
        self.kind = kind
        self.packages = packages
        self._pattern = re.compile(rf'^@?{variable}\.register\(\s*"([^"]+)"', re.M)
        self._more = more
        self._entries: dict[str, T] = {}
        self._found: dict[str, str] | None = None

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its object under ``name`` and returns it as it is.

        Raises ``ValueError`` when another object already has the name, or a file that is not imported yet.
        """

        def file_under(entry: T) -> T:
            home = self._modules().get(name)
            taken = home is not None and name not in self._entries and home not in sys.modules
            if taken or self._entries.setdefault(name, entry) is not entry:
                raise ValueError(f"two entries of the {self.kind} registry are called {name!r}")
            return entry

        return file_under

    def names(self) -> list[str]:
        """Every registered name, sorted. Imports none of the packages' files."""
        if self._more is not None:
            self._more()
        return sorted({*self._modules(), *self._entries})

    def get(self, name: str) -> T:
        """The entry called ``name``. Raises ``UserError`` that lists the choices when there is none."""
        if name not in self._entries and (home := self._modules().get(name)):
            importlib.import_module(home)
        if name not in self._entries and name not in (known := self.names()):
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, known)}; choose one of: {', '.join(known)}")
        return self._entries[name]

    def items(self) -> list[tuple[str, T]]:
        """(name, entry) pairs in the order of :meth:`names`."""
        return [(name, self.get(name)) for name in self.names()]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._modules() or name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def _modules(self) -> dict[str, str]:
        """Name -> the module whose file registers it. Raises ``ValueError`` for a name that two files register."""
        if self._found is None:
            found: dict[str, str] = {}
            for package in self.packages:
                for module, text in _sources(package):
                    for name in self._pattern.findall(text):
                        if found.setdefault(name, module) != module:
                            raise ValueError(f"two entries of the {self.kind} registry are called {name!r}")
            self._found = found
        return self._found


def _sources(package: str) -> Iterator[tuple[str, str]]:
    """(module, text) of every file of ``package`` and of the folders in it, without importing the package."""
    spec = importlib.util.find_spec(package)
    for folder in map(Path, (spec.submodule_search_locations if spec else None) or ()):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path.read_text(encoding="utf-8")
