"""The registries of what can be named on the command line or in a settings file, and the plugins that add to them.

Nothing here imports torch, and no name does: see :mod:`redraft.registry`. What an entry must be stands beside those
there are: ``redraft.losses``, ``redraft.selection``, ``redraft.starts``, ``redraft.drafts.formats.base``,
``redraft.drafts.base`` and ``redraft.data.suites``.

A plugin is a module that registers at import, ``package.module``, or a function that does so when it is called,
``package.module:function``. Installed packages name theirs in the entry point group ``redraft.plugins``; any other is
named with ``redraft --plugin``, also as a file, ``my_loss.py``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from redraft.errors import UserError
from redraft.registry import Registry

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
        except Exception as error:
            why = f"{type(error).__name__}: {error}; mend it or leave it out"
            _loaded[plugin] = UserError(f"plugin {name or plugin} cannot be loaded: {why}")
    if failed := _loaded[plugin]:
        raise failed


def _from_file(path: Path) -> Any:
    """The module in the file ``path``. Raises ``OSError`` when there is none, and what the file raises."""
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


def _registry(kind: str, variable: str, *rooms: str) -> Registry[Any]:
    return Registry(kind, variable, tuple(f"redraft.{room}" for room in rooms), load_installed)


LOSSES = _registry("loss", "LOSSES", "losses")
SCORERS = _registry("scorer", "SCORERS", "selection", "attic")
STARTS = _registry("start", "STARTS", "starts", "attic")
EXPORTERS = _registry("export format", "EXPORTERS", "drafts")
FAMILIES = _registry("draft family", "FAMILIES", "drafts")
SUITES = _registry("suite", "SUITES", "data.suites")
