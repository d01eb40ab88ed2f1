"""The pages tell the truth: commands, options, settings, paths, links and imports in them exist.

Nothing is run here; tests/e2e/test_pages.py runs the lines of README and of the user's pages on a tiny model.
"""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.main import get_command

import redraft
from redraft.cli.main import app
from redraft.settings.base import read
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.settings.studies import read_study

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# A diary: it tells of commands, options and files as they were on its days. Its links must lead somewhere all the same.
DIARY = "docs/dev/log.md"
CURRENT = [name for name in NAMES if name != DIARY]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.M)

# Options of other programs that the pages name, by program.
OTHERS = {
    "llama.cpp": ("--spec-type", "--spec-draft-p-min"),
    "vLLM": ("--per-request-spec-decode-metrics", "--no-enable-prefix-caching", "--no-enable-chunked-prefill"),
    "speculators": ("--from-pretrained", "--verifier-name-or-path", "--draft-vocab-size"),
    "pip": ("--no-deps",),
    "some server": ("--api-key", "--port"),
    "scripts of ours": ("--counts-only", "--drafters", "--domain", "--general", "--strength"),
}
FOREIGN = {option for options in OTHERS.values() for option in options}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(*languages: str) -> list[Block]:
    """Every fenced block of these languages in the pages of today."""
    found = []
    for name in CURRENT:
        text = text_of(name)
        for match in FENCE.finditer(text):
            if match[1] in languages:
                found.append(Block(name, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def prose(name: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text_of(name))


def command_lines(block: str) -> Iterator[str]:
    """The lines of a shell block, continued ones in one piece, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words)


# -- the command line ------------------------------------------------------------------------------------------------
GROUP: Any = get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands


def options_of(command: Any) -> set[str]:
    return {name for one in command.params for name in [*one.opts, *one.secondary_opts]} | {"--help"}


def bare(words: list[str]) -> list[str]:
    """A command without what may stand before it: variables of the environment, and plugins."""
    while len(words) > 1 and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    while words[:2] == ["redraft", "--plugin"]:
        words = [words[0], *words[3:]]
    return words


def check_whole(words: list[str]) -> None:
    """Parse a whole command as the command line would: options, types, and nothing required left out."""
    if words[:1] in (["--version"], ["--help"]):
        return
    assert words and words[0] in COMMANDS, f"no command {words[:1]}"
    context = GROUP.context_class(GROUP, info_name="redraft")
    COMMANDS[words[0]].make_context(words[0], list(words[1:]), parent=context)


def test_every_shell_block_says_what_it_is() -> None:
    assert [str(block) for block in blocks("")] == [], "name the language behind the three backticks"


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands_in_blocks_parse(block: Block) -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", text_of("Makefile"), flags=re.M))
    for line in command_lines(block.text):
        words = bare(shlex.split(line))
        if words[0] == "redraft":
            check_whole(words[1:])
        elif words[0] == "make":
            assert set(words[1:]) <= targets, line
        elif words[0] in ("bash", "python") and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), line
        else:
            assert words[0] in ("pip", "vllm", "llama-server", "trtllm-serve", "python"), f"{block}: who runs `{line}`?"


@pytest.mark.parametrize("name", CURRENT)
def test_commands_in_the_text_exist(name: str) -> None:
    """A command named in a sentence may leave required options out; what it names must exist."""
    for code in CODE.findall(prose(name)):
        words = bare(code.split())
        if words[0] == "make" and len(words) > 1:
            assert re.search(rf"^{re.escape(words[1])}:", text_of("Makefile"), flags=re.M), code
        if words[0] in ("bash", "python") and len(words) > 1 and words[1].endswith((".sh", ".py")):
            assert (ROOT / words[1]).is_file(), code
        if words[0] != "redraft" or len(words) == 1 or words[1] in ("COMMAND", "[COMMAND]"):
            continue
        given = [word for word in words[1:] if word not in options_of(GROUP)]
        assert not given or given[0] in COMMANDS or given[0] == "COMMAND", f"{name}: `{code}`"
        if given and given[0] in COMMANDS:
            unknown = {word for word in given if word.startswith("--")} - options_of(COMMANDS[given[0]])
            assert not unknown, f"{name}: `{code}` has {unknown}"


@pytest.mark.parametrize("name", CURRENT)
def test_options_in_the_text_are_of_some_command(name: str) -> None:
    known = {option for command in COMMANDS.values() for option in options_of(command)} | options_of(GROUP) | FOREIGN
    found = {option for code in CODE.findall(prose(name)) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert found <= known, sorted(found - known)


def test_the_pages_made_from_the_code_are_up_to_date() -> None:
    """Else: make reference."""
    made = runpy.run_path(str(ROOT / "docs/tools/reference.py"))
    assert list(made["outdated"]()) == []


# -- settings --------------------------------------------------------------------------------------------------------
READERS = {
    "redraft adapt": lambda path: read(AdaptConfig, path),
    "redraft distill": lambda path: read(DistillConfig, path),
    "redraft study": lambda path: read_study(path),
}


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_settings_in_blocks_are_settings(block: Block, tmp_path: Path) -> None:
    head = re.match(r"# settings of (redraft \w+)\n", block.text)
    assert head, f"{block}: begin it with `# settings of redraft COMMAND`"
    path = tmp_path / "settings.yaml"
    path.write_text(block.text)
    assert READERS[head[1]](path)


# -- Python ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_parse_and_import_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("redraft"):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], str(block)


def test_the_api_page_has_every_name() -> None:
    """Registries stand in its text, which is no docstring of theirs."""
    shown = set(re.findall(r"^::: redraft\.([\w.]+)$", text_of("docs/api.md"), flags=re.M)) - {"metrics"}
    homes = {f"{home}.{name}".removeprefix("redraft.") for name, home in redraft._HOME_OF.items() if not name.isupper()}
    assert shown == homes


# -- links and paths -------------------------------------------------------------------------------------------------
def anchors(text: str) -> tuple[set[str], set[str]]:
    """The anchors of a page's headings: as the site makes them, and as code hosts do; those of docstrings."""
    docstrings = re.findall(r"^::: (\S+)$", text, flags=re.M)
    site, host = set(docstrings), set(docstrings)
    for heading in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "").lower()
        kept = re.sub(r"[^\w\s-]", "", plain).strip()
        site.add(re.sub(r"[-\s]+", "-", kept))
        host.add(re.sub(r"\s", "-", kept))
    return site, host


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for match in LINK.finditer(prose(name)):
        target = match[1] or match[2]
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / name).parent / path if path else ROOT / name
        assert place.exists(), f"{name} links to {target}"
        if anchor:
            site, host = anchors(place.read_text(encoding="utf-8"))
            assert anchor in site and anchor in host, f"{name} links to {target}"


FOLDERS = ("", "src/", "src/redraft/", "tests/")
PATH = re.compile(r"(?:[\w-]+/)+(?:[\w.-]+\.[a-z]+)?")
FILE = re.compile(r"[\w-]+\.py")
# Folders of a run that are called like rooms of the package.
OF_RUNS = ("features/", "train/", "export/")
EXAMPLES = ("my_loss.py",)


@pytest.mark.parametrize("name", CURRENT)
def test_paths_in_the_text_exist(name: str) -> None:
    """A path that begins in one of our folders ends at something there; files of others and of runs are left alone.

    A developer's page may name a file of several folders (a family's ``reading.py``): one of that name must be there.
    """
    missing = []
    for code in CODE.findall(prose(name)):
        if PATH.fullmatch(code) and code not in OF_RUNS and not (code.startswith("train/") and ".py" not in code):
            first = code.partition("/")[0]
            # "out" is what our own commands write to: it is there or not.
            homes = [ROOT / folder for folder in FOLDERS if first != "out" and (ROOT / folder / first).exists()]
            ours = bool(homes)
        elif FILE.fullmatch(code):
            homes = [ROOT / folder for folder in FOLDERS] + [path.parent for path in (ROOT / "src").rglob(code)]
            ours = name.startswith("docs/dev/") and code not in EXAMPLES
        else:
            continue
        if ours and not any((home / code).exists() for home in homes):
            missing.append(code)
    assert missing == []


NAME = re.compile(r"[A-Z]\w*[a-z]\w*|[a-z]+(?:_[a-z]+)*|[A-Z]+(?:_[A-Z]+)*")


def test_the_map_of_the_house_names_what_there_is() -> None:
    """Functions, classes and settings that it names as code stand somewhere in the package, as whole words."""
    words = {word for path in (ROOT / "src").rglob("*.py") for word in re.findall(r"\w+", path.read_text("utf-8"))}
    rooms = {path.name for path in (ROOT / "tests").iterdir()}
    named = {code.removesuffix("()").partition(".")[0] for code in CODE.findall(prose("docs/dev/house.md"))}
    assert {name for name in named if NAME.fullmatch(name)} <= words | rooms | {"code", "NAME"}


def test_the_site_shows_every_page() -> None:
    site = yaml.safe_load(text_of("mkdocs.yml"))

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from pages(part)

    shown = sorted(pages(site["nav"]))
    inside = [name.removeprefix("docs/") for name in NAMES if name.startswith("docs/")]
    assert shown == sorted([*inside, "index.md", "changelog.md", "contributing.md"])
