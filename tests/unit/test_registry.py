"""The registry: discovery in a folder, lookup, and clear messages."""

from __future__ import annotations

import sys

import pytest

from redraft.errors import UserError
from redraft.registry import Registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "zoo_of_this_test"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        'from redraft.registry import Registry\nZOO = Registry("animal", package="zoo_of_this_test")\n'
    )
    for animal in ("otter", "heron"):
        (folder / f"{animal}_file.py").write_text(
            f'from zoo_of_this_test import ZOO\n\n\n@ZOO.register("{animal}")\ndef {animal}():\n    return "{animal}!"'
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("zoo_of_this_test")]:
        del sys.modules[name]


def test_every_module_of_the_folder_is_found(package):
    from zoo_of_this_test import ZOO  # type: ignore[import-not-found]

    assert ZOO.names() == ["heron", "otter"]
    assert ZOO.get("otter")() == "otter!"
    assert "heron" in ZOO and "lion" not in ZOO and len(ZOO) == 2 and list(ZOO) == ["heron", "otter"]
    assert [name for name, _ in ZOO.items()] == ["heron", "otter"]


def test_unknown_name_lists_the_choices_and_the_nearest():
    zoo: Registry[int] = Registry("animal")
    zoo.register("otter")(1)
    zoo.register("heron")(2)
    with pytest.raises(UserError, match=r"unknown animal 'oter' \(did you mean otter\?\); choose one of: heron, otter"):
        zoo.get("oter")


def test_a_name_is_taken_once():
    zoo: Registry[object] = Registry("animal")
    first = object()
    assert zoo.register("otter")(first) is first
    zoo.register("otter")(first)
    with pytest.raises(ValueError, match="otter"):
        zoo.register("otter")(object())


def test_a_module_that_fails_to_import_is_reported_each_time(package):
    (package / "broken.py").write_text("raise RuntimeError('half-written file')\n")
    from zoo_of_this_test import ZOO  # type: ignore[import-not-found]

    for _ in range(2):
        with pytest.raises(RuntimeError, match="half-written"):
            ZOO.names()
