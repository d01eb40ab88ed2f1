"""The registries: names without imports, lookup, plugins, and clear messages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from redraft import registries
from redraft.errors import UserError
from redraft.registries import Registry

SOURCE = Path(registries.__file__).parents[1]


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A registry over a folder with two animals, one of them a folder down."""
    folder = tmp_path / "zoo_of_this_test"
    (folder / "water").mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "from redraft.registries import Registry\n"
        'ZOO = Registry("animal", "ZOO", ("zoo_of_this_test",))\n'
        'HINT = """\n    @ZOO.register("gnu") is how to add one\n"""\n'
    )
    for animal, file in (("otter", "water/__init__.py"), ("heron", "heron_file.py")):
        (folder / file).write_text(
            f'from zoo_of_this_test import ZOO\n\n\n@ZOO.register("{animal}")\ndef {animal}():\n    return "{animal}!"'
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    from zoo_of_this_test import ZOO  # type: ignore[import-not-found]

    yield ZOO
    for name in [name for name in sys.modules if name.startswith("zoo_of_this_test")]:
        del sys.modules[name]


def test_names_come_from_the_text_and_an_entry_is_imported_when_it_is_asked_for(zoo):
    assert zoo.names() == ["heron", "otter"] == list(zoo)
    assert "heron" in zoo and "lion" not in zoo
    assert not {"zoo_of_this_test.water", "zoo_of_this_test.heron_file"} & set(sys.modules)
    assert zoo.get("otter")() == "otter!"
    assert "zoo_of_this_test.water" in sys.modules and "zoo_of_this_test.heron_file" not in sys.modules
    assert [name for name, _ in zoo.items()] == ["heron", "otter"]


def test_a_name_of_a_file_is_taken_before_the_file_is_imported(zoo):
    with pytest.raises(ValueError, match="two entries of the animal registry are called 'otter'"):
        zoo.register("otter")(object())
    assert zoo.get("otter")() == "otter!"


def test_two_files_of_one_name_are_a_defect(zoo, tmp_path):
    (tmp_path / "zoo_of_this_test" / "second.py").write_text('ZOO.register("otter")(2)\n')
    with pytest.raises(ValueError, match="two entries of the animal registry are called 'otter'"):
        zoo.names()


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


def test_a_file_that_fails_to_import_is_reported_each_time(zoo, tmp_path):
    (tmp_path / "zoo_of_this_test" / "broken.py").write_text(
        'raise RuntimeError("half-written")\nZOO.register("emu")(1)\n'
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half-written"):
            zoo.get("emu")


def run(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": ":".join(map(str, [SOURCE, *folders])), "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


EACH = "from redraft import registries\nfrom redraft.registries import Registry\n"
EACH += "for registry in vars(registries).values():\n    if isinstance(registry, Registry): "


def test_listing_all_names_imports_nothing_heavy():
    heavy = "import sys\nassert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules), 'heavy'"
    found = run(f"{EACH}print(*registry.names())\n{heavy}")
    assert found.returncode == 0, found.stderr
    assert "kl" in found.stdout and "eagle3" in found.stdout and "gsm8k" in found.stdout


def test_the_names_read_are_those_that_importing_every_file_registers():
    every = "import importlib\n"
    for path in sorted((SOURCE / "redraft").rglob("*.py")):
        parts = [part for part in path.relative_to(SOURCE).with_suffix("").parts if part != "__init__"]
        if parts[1:2] == ["assets"]:  # another program's
            continue
        every += f"importlib.import_module('{'.'.join(parts)}')\n"
    found = run(f"{every}{EACH}print(registry.names() == sorted(registry._entries), registry.kind)")
    assert found.returncode == 0, found.stderr
    said = found.stdout.splitlines()
    assert len(said) == 6 and all(line.startswith("True ") for line in said), said


# -- plugins ---------------------------------------------------------------------------------------------------------
PRINT = "from redraft.registries import *\nimport redraft.registries as r\nfrom redraft.errors import UserError\n"


def installed(tmp_path: Path, value: str, **files: str) -> Path:
    """A folder as pip would leave it: modules, and the metadata of one package with one entry point."""
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    meta = tmp_path / "animals-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: animals\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(f"[redraft.plugins]\nzoo = {value}\n")
    return tmp_path


MINE = 'from redraft.registries import LOSSES\ndef load():\n    LOSSES.register("mine")(len)\n'


def test_an_installed_plugin_registers_by_its_entry_point(tmp_path):
    folder = installed(tmp_path, "animals:load", animals=MINE)
    found = run(PRINT + "print(LOSSES.get('mine') is len, 'mine' in LOSSES.names(), 'kl' in LOSSES)", folder)
    assert found.stdout.split() == ["True", "True", "True"], found.stderr


@pytest.mark.parametrize(
    ("value", "text", "message"),
    [
        (
            "animals",
            'from redraft.registries import LOSSES\nLOSSES.register("kl")(len)\n',
            "cannot be loaded: ValueError: two entries of the loss registry are called 'kl'",
        ),
        ("animals", "import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("animals:load", "x = 1\n", "AttributeError: module 'animals' has no attribute 'load'"),
        ("animals", "raise SystemExit(3)\n", "cannot be loaded: SystemExit: 3"),
        (
            "animals",
            'from redraft.registries import LOSSES\nLOSSES.register("three")(3)\n',
            "what is registered as the loss 'three' cannot be called",
        ),
        (
            "animals",
            'from redraft.registries import STARTS\nSTARTS.register("none-at-all")(len)\n',
            "what is registered as the start 'none-at-all' has no run and no needs",
        ),
        (
            "animals",
            "from redraft.registries import LOSSES\nLOSSES.register('')(print)\n",
            "an entry of the loss registry is called '', which is no name",
        ),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_named_in_one_line_each_time(tmp_path, value, text, message):
    folder = installed(tmp_path, value, animals=text)
    again = "    try: LOSSES.names()\n    except UserError as e: print(e)\n"
    found = run(f"{PRINT}for _ in range(2):\n{again}", folder)
    first, second = found.stdout.splitlines()
    assert message in first and first == second and "plugin zoo of package animals" in first


def test_a_plugin_may_be_a_module_or_a_file_and_is_loaded_once(tmp_path):
    (tmp_path / "mine.py").write_text(MINE + "print('once')\nload()\n")
    file = tmp_path / "other.py"
    file.write_text(MINE.replace("mine", "other") + "load()\n")
    code = PRINT + f"r.load_plugin('mine'); r.load_plugin('mine'); r.load_plugin({str(file)!r}); print(LOSSES.names())"
    found = run(code, tmp_path)
    assert found.stdout.count("once") == 1 and "'mine'" in found.stdout and "'other'" in found.stdout, found.stderr
    missing = run(PRINT + "r.load_plugin('nowhere.py')")
    assert re.search(r"UserError: plugin nowhere.py cannot be loaded: nowhere.py does not exist", missing.stderr)
