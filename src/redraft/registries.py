"""The registries of what can be named on the command line or in a settings file, and the plugins that add to them.

    @LOSSES.register("kl")
    def kl(...): ...

Each entry stands in a file of its own that registers itself. Which names there are is read from the text of the
packages' files, and a file is imported when its entry is asked for: help and error messages list every choice without
importing torch. So the registration stands at the beginning of a line, after the registry's variable, with the name
written out. What an entry must be stands beside those there are: ``redraft.losses``, ``redraft.selection``,
``redraft.starts``, ``redraft.drafts.formats.base``, ``redraft.drafts.base`` and ``redraft.data.suites``.

A plugin is a module that registers at import, ``package.module``, or a function that does so when it is called,
``package.module:function``. Installed packages name theirs in the entry point group ``redraft.plugins``; any other is
named with ``redraft --plugin``, also as a file, ``my_loss.py``.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
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
    further entries (plugins). ``needs`` are attributes that every entry must have.
    """

    def __init__(
        self,
        kind: str,
        variable: str = "",
        packages: tuple[str, ...] = (),
        more: Callable[[], None] | None = None,
        needs: tuple[str, ...] = (),
    ) -> None:
        self.kind, self.needs = kind, needs
        self.packages = packages
        self._pattern = re.compile(rf'^@?{variable}\.register\(\s*"([^"]+)"', re.M)
        self._more = more
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its object under ``name`` and returns it as it is.

        Raises ``ValueError`` when it is no name, or another object already has it, or a file that is not imported yet,
        and for an object that lacks what an entry needs.
        """

        def file_under(entry: T) -> T:
            if not isinstance(name, str) or not name:
                raise ValueError(f"an entry of the {self.kind} registry is called {name!r}, which is no name")
            if lacking := [attribute for attribute in self.needs if not hasattr(entry, attribute)]:
                what = "cannot be called" if lacking == ["__call__"] else f"has no {' and no '.join(lacking)}"
                raise ValueError(f"what is registered as the {self.kind} {name!r} {what}")
            home = self._modules.get(name)
            taken = home is not None and name not in self._entries and home not in sys.modules
            if taken or self._entries.setdefault(name, entry) is not entry:
                raise ValueError(f"two entries of the {self.kind} registry are called {name!r}")
            return entry

        return file_under

    def names(self) -> list[str]:
        """Every registered name, sorted. Imports none of the packages' files."""
        if self._more is not None:
            self._more()
        return sorted({*self._modules, *self._entries})

    def get(self, name: str) -> T:
        """The entry called ``name``. Raises ``UserError`` that lists the choices when there is none."""
        if name not in self._entries and (home := self._modules.get(name)):
            importlib.import_module(home)
        if name not in self._entries and name not in (known := self.names()):
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, known)}; choose one of: {', '.join(known)}")
        return self._entries[name]

    def items(self) -> list[tuple[str, T]]:
        """(name, entry) pairs in the order of :meth:`names`."""
        return [(name, self.get(name)) for name in self.names()]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._modules or name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    @functools.cached_property
    def _modules(self) -> dict[str, str]:
        """Name -> the module whose file registers it. Raises ``ValueError`` for a name that two files register."""
        found: dict[str, str] = {}
        for package in self.packages:
            for module, text in _sources(package):
                for name in self._pattern.findall(text):
                    if found.setdefault(name, module) != module:
                        raise ValueError(f"two entries of the {self.kind} registry are called {name!r}")
        return found


def _sources(package: str) -> Iterator[tuple[str, str]]:
    """(module, text) of every file of ``package`` and of the folders in it, without importing the package."""
    spec = importlib.util.find_spec(package)
    for folder in map(Path, (spec.submodule_search_locations if spec else None) or ()):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path.read_text(encoding="utf-8")


# -- plugins ---------------------------------------------------------------------------------------------------------
PLUGINS = "redraft.plugins"

# A plugin that could not be loaded is not tried again: it may have registered half of what it has.
_loaded: dict[str, UserError | None] = {}


def load_plugin(plugin: str, name: str = "") -> None:
    """Import ``plugin`` and let it register, once: a module, ``module:function`` or the path of a Python file.

    ``name`` is what an error calls it. Raises ``UserError`` naming the plugin when it cannot be loaded or registers a
    name that is taken.
    """
    if plugin not in _loaded:
        _loaded[plugin] = None  # first: what it imports may ask a registry
        try:
            place, _, function = plugin.partition(":")
            module: Any = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
            if function:
                getattr(module, function)()
        except (Exception, SystemExit) as error:
            named = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            why = f"{named}{error}; mend it or leave it out"
            _loaded[plugin] = UserError(f"plugin {name or plugin} cannot be loaded: {why}")
    if failed := _loaded[plugin]:
        raise failed


def _from_file(path: Path) -> Any:
    """The module in the file ``path``. Raises ``OSError`` when there is none, and what the file raises."""
    from redraft.inputs import require_file  # not at the top: names are listed without pydantic

    require_file(path, "name a Python file")
    name = f"redraft_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve(strict=True))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@functools.cache
def load_installed() -> None:
    """Load the plugins of installed packages, once. Raises ``UserError`` as :func:`load_plugin`."""
    for point in entry_points(group=PLUGINS):
        package = f" of package {point.dist.name}" if point.dist else ""
        load_plugin(point.value, point.name + package)


LOSSES = Registry[Any]("loss", "LOSSES", ("redraft.losses",), load_installed, ("__call__",))
SCORERS = Registry[Any]("scorer", "SCORERS", ("redraft.selection", "redraft.attic"), load_installed, ("score",))
STARTS = Registry[Any]("start", "STARTS", ("redraft.starts", "redraft.attic"), load_installed, ("run", "needs"))
EXPORTERS = Registry[Any]("export format", "EXPORTERS", ("redraft.drafts",), load_installed, ("__call__",))
FAMILIES = Registry[Any]("draft family", "FAMILIES", ("redraft.drafts",), load_installed, ("build", "fresh", "read"))
SUITES = Registry[Any]("suite", "SUITES", ("redraft.data.suites",), load_installed, ("convert",))
