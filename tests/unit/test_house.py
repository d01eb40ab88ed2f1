"""The rules of the house: imports point down, functions and files stay readable, nothing private to a workplace."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
from collections.abc import Collection
from pathlib import Path

import pytest

import redraft

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "redraft"

# From the roof to the ground. A room may import rooms of lower rows, and itself.
ROWS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("api",),
    ("adaptation",),
    ("attic",),
    ("training", "evaluate", "reports"),
    ("selection", "decode", "starts"),
    ("acceptance",),
    ("data",),
    ("drafts",),
    ("features",),
    ("loading",),
    ("target", "losses"),
    ("metrics", "sampling", "artifact", "provenance", "graphs", "locks"),
    ("progress", "files", "arithmetic", "pieces", "rows", "shown"),
    ("settings",),
    ("registries", "places"),
    ("inputs", "values"),
    ("seals",),
    ("errors", "assets"),
)
HEIGHT = {room: len(ROWS) - i for i, row in enumerate(ROWS) for room in row}

FILE_LINES = 450
FUNCTION_LINES = 80

# Assembled from parts, so that this file does not trip over itself.
FORBIDDEN = [
    re.compile(
        "|".join([r"py" + r"pi\.org", r"python" + r"hosted\.org", r"download\.py" + r"torch\.org", r"npm" + r"js\."])
    ),
    re.compile(r"(?<![\w.])/" + r"(?:work|root|tmp/w)/[\w.]"),
]
TEXT = {".py", ".md", ".toml", ".txt", ".sh", ".yaml", ".yml", ".json", ".jsonl", ".html", ".cfg", ".j2", ""}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The first folder or file name below the package; the package's own ``__init__`` is no room."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, room) of every import from redraft, also those inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append((node.lineno, "<relative>"))
        elif isinstance(node, ast.ImportFrom) and node.module == "redraft":
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("redraft."):
            found.append((node.lineno, str(node.module).split(".")[1]))
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found += [(node.lineno, p[1]) for p in parts if p[0] == "redraft" and len(p) > 1]
    return found


def wrong_imports(room: str, tree: ast.AST) -> list[str]:
    """What ``room`` imports against the rules. ``__version__`` is the one name that anybody may take."""
    wrong = []
    for line, other in imported_rooms(tree):
        if other in (room, "__version__"):
            continue
        if other not in HEIGHT:
            wrong.append(f"line {line}: {other} has no place in ROWS")
        elif HEIGHT[other] >= HEIGHT[room]:
            wrong.append(f"line {line}: {room} may not import {other}")
    return wrong


def tracked_files() -> list[Path]:
    """Files under version control; everything that is not ignored where there is no git."""
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def test_the_package_init_imports_nothing_heavy() -> None:
    """What it offers is imported when it is asked for, and typed in a file of its own that lists the same names."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert imported == ["importlib", "os"] and not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    lines = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    typed = {(node.module, alias.name) for node in lines for alias in node.names}
    assert typed == {(home, name) for name, home in redraft._HOME_OF.items()}
    rooms = {path.stem for path in PACKAGE.iterdir()}
    assert not rooms & set(redraft._HOME_OF), "importing a room of this name would take the name's place"


def test_every_room_has_its_place() -> None:
    rooms = {room_of(path) for path in modules()} - {"__init__"}
    assert rooms <= set(HEIGHT), f"add to ROWS: {sorted(rooms - set(HEIGHT))}"


def test_imports_point_down() -> None:
    wrong = []
    for path in modules():
        room = room_of(path)
        if room != "__init__":
            wrong += [f"{path.relative_to(ROOT)} {text}" for text in wrong_imports(room, ast.parse(path.read_text()))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "code", "allowed"),
    [
        ("training", "from redraft.drafts.eagle3 import Eagle3Draft", True),
        ("training", "from redraft.training.trainer import fit", True),
        ("training", "from redraft import __version__", True),
        ("training", "from redraft.evaluate import speed", False),
        ("drafts", "import redraft.target", True),
        ("target", "import redraft.drafts", False),
        ("drafts", "def f():\n    from redraft.training import loop", False),
        ("drafts", "from ..target import Target", False),
        ("target", "from redraft import drafts", False),
        ("drafts", "from redraft.cellar import x", False),
        ("registries", "from redraft.artifact import x", False),
    ],
)
def test_the_import_rule_itself(room: str, code: str, allowed: bool) -> None:
    assert (not wrong_imports(room, ast.parse(code))) == allowed


def module_name(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = ["redraft", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, known: Collection[str]) -> set[str]:
    """Modules among ``known`` that are imported anywhere, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            if any(f"{node.module}.{alias.name}" not in known for alias in node.names):
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(known)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, by whatever way."""

    def reached(start: str) -> set[str]:
        seen, waiting = set[str](), [start]
        while waiting:
            for name in graph[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    reach = {name: reached(name) for name in graph}
    found = []
    for name in sorted(graph):
        if name in reach[name] and not any(name in circle for circle in found):
            found.append({other for other in reach[name] if name in reach[other]})
    return found


def test_no_modules_import_each_other() -> None:
    trees = {module_name(path): ast.parse(path.read_text()) for path in modules()}
    graph = {name: imported_modules(tree, trees) - {"redraft"} for name, tree in trees.items()}
    found = circles(graph)
    assert not found, "\n".join(str(sorted(circle)) for circle in found)


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("from redraft.a import b", {"redraft.a.b"}),
        ("from redraft.a import b, x", {"redraft.a", "redraft.a.b"}),
        ("def f():\n    import redraft.a.b", {"redraft.a.b"}),
        ("if TYPE_CHECKING:\n    from redraft.a.b import X", {"redraft.a.b"}),
    ],
)
def test_the_circle_rule_itself(code: str, imported: set[str]) -> None:
    assert imported_modules(ast.parse(code), {"redraft.a", "redraft.a.b"}) == imported
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [{"b", "c"}, {"d"}]


def test_files_and_functions_are_readable() -> None:
    long = []
    for path in [*modules(), *sorted((ROOT / "runs").glob("*.py"))]:
        text = path.read_text()
        if text.count("\n") > FILE_LINES:
            long.append(f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines, limit {FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    long.append(f"{where} {node.name} has {lines} lines, limit {FUNCTION_LINES}")
    assert not long, "\n".join(long)


def test_no_pickle_in_the_package() -> None:
    """Tensors of torch's older files are read in one place, by the reader that runs nothing."""
    reader = 'torch.load(path, map_location="cpu", weights_only=True)'
    assert (PACKAGE / "artifact.py").read_text().count(reader) == 1
    found = [
        str(path.relative_to(ROOT))
        for path in modules()
        if re.search(
            r"^\s*(?:import|from) (?:pickle|dill|cloudpickle)\b|torch\.(?:load|save)\(",
            path.read_text().replace(reader, ""),
            re.M,
        )
    ]
    assert not found, f"pickle in {found}"


def test_tracked_text_names_no_registry_host_and_no_workplace_path() -> None:
    found = []
    for path in tracked_files():
        if path.suffix not in TEXT or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            for pattern in FORBIDDEN:
                if match := pattern.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("see https://" + "py" + "pi.org/project/x", True),
        ("open('/" + "work/main/x')", True),
        ("cd /" + "tmp/w/smol", True),
        ("https://example.org/" + "work/life", False),
        ("the frame" + "work/ folder", False),
        ("/tmp/redraft", False),
    ],
)
def test_the_text_rule_itself(line: str, caught: bool) -> None:
    assert any(pattern.search(line) for pattern in FORBIDDEN) == caught


SCRIPTS = sorted(path for folder in ("benchmarks", "runs") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a script takes from the package is there. Nothing runs it between two measurements.

    A module that only scripts import has nothing to run.
    """
    monkeypatch.syspath_prepend(str(path.parent))
    loaded = runpy.run_path(str(path), run_name="loaded")
    assert callable(loaded.get("main")) == ('if __name__ == "__main__"' in path.read_text())
