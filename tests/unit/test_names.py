"""Names are data on every way out, whatever they hold: pages, pictures, tables, lines of progress, file names."""

from __future__ import annotations

import copy
import io
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from redraft.adaptation.server_bench import log_of
from redraft.data.transport import excerpt
from redraft.errors import UserError, printable
from redraft.progress import fields_text, progress_bar
from redraft.reports import build_report, headline_png, tables
from redraft.reports.study import table
from redraft.shown import lines, told

DATA = runpy.run_path(str(Path(__file__).parents[1] / "report_data.py"))
# Harmless, and each of them once did something or might: to a page, a terminal, a picture, a path, a format.
NAMES = [
    "<script>alert(1)</script>",
    "a</td></tr><b>bold",
    "&amp; \" ' `tick` ```",
    "two\nlines | a bar",
    "carriage\rreturn",
    "\x1b[31mred\x1b[0m \x07bell",
    "\x00null",
    "right \u202eleft",
    "[bold]not[/bold] [/red] [link=file:///x]y[/link]",
    "trailing backslash \\",
    "$\\frac{1}{0$ and $$",
    "\\1 \\g<0> \\d",
    "{format} {0} {} %s %(x)d",
    "{{ 7 * 7 }}{% raw %}",
    "../../up/and/away",
    "_beginning",
    "=1+1",
    "x" * 3000,
    "\ud800",
    " ",
]
# Half a character stands in no file: readers refuse it.
WHOLE = [name for name in NAMES if name != "\ud800"]
ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def renamed(names: list[str]) -> dict[str, Any]:
    """A result whose drafts, tasks, target and notes are called so."""
    made = copy.deepcopy(DATA["rich_bench"]())
    drafts = list(made["drafts"])
    to = dict(zip(drafts, names, strict=False))
    made["drafts"] = {to.get(name, name): found for name, found in made["drafts"].items()}
    for line in made["per_prompt"]:
        line["drafts"] = {to.get(name, name): found for name, found in line["drafts"].items()}
    for trace in made.get("traces", []):
        trace["drafts"] = {to.get(name, name): found for name, found in trace["drafts"].items()}
    made["gains"] = {}
    made["setup"]["target"] = names[0]
    for found in made["drafts"].values():
        if found.get("by_task"):
            found["by_task"] = dict(zip(names, found["by_task"].values(), strict=False))
    made["server"] = DATA["server"]() | {"notes": names}
    return made


class Reader(HTMLParser):
    """Elements and running text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_page_has_the_same_elements_whatever_things_are_called(tmp_path: Path) -> None:
    import json

    pages = []
    for number, names in enumerate([[f"plain {i}" for i in range(len(NAMES))], NAMES[:-2] + ["y", "z"]]):
        file = tmp_path / f"bench{number}.json"
        file.write_text(json.dumps(renamed(names)))
        page = Reader()
        out = build_report([file], tmp_path / f"page{number}.html", title=names[0]).read_text(encoding="utf-8")
        assert not ACTING.search(out)
        page.feed(out)
        pages.append(page)
    assert sorted(set(pages[0].elements)) == sorted(set(pages[1].elements))
    assert pages[0].elements.count("script") == pages[1].elements.count("script") == 1
    assert "alert(1)" in "".join(pages[1].text) and "{{ 7 * 7 }}" in "".join(pages[1].text)


@pytest.mark.parametrize("name", WHOLE, ids=range(len(WHOLE)))
def test_pictures_and_tables_take_any_name(name: str) -> None:
    result = renamed([name, name + " too"])
    if name != "\ud800":
        found = list(result["drafts"])
        assert found[0] == name
    shown = Console(file=io.StringIO(), width=140, force_terminal=True)
    for made in (tables.bench_table(result), tables.acceptance_table(result), tables.task_table(result)):
        shown.print(made)
    said = shown.file.getvalue()  # type: ignore[attr-defined]
    assert not ACTING.search(re.sub(r"\x1b\[[0-9;]*m", "", said).replace("\r", "")) and "\x1b[31m" not in said


@pytest.mark.parametrize("some", [NAMES[:3], NAMES[8:11], NAMES[10:13], NAMES[15:18]], ids=range(4))
def test_pictures_take_any_name(some: list[str], tmp_path: Path) -> None:
    import json

    file = tmp_path / "bench.json"
    file.write_text(json.dumps(renamed(some)))
    assert headline_png(file, tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_lines_take_any_name(name: str, tmp_path: Path) -> None:
    for said in (str(UserError(f"x {name}")), fields_text({"now": name}), excerpt(name), printable(name), told(name)):
        assert not ACTING.search(said) and len(said.splitlines()) <= 1
    assert not ACTING.search(lines(name).plain) and lines(name).plain.count("\n") == 0
    assert table(["a", "b"], [[name, "1"]]).count("\n") == 2
    place = log_of(tmp_path / "bench.json", name, [name, "other"])
    assert place.parent == tmp_path and len(place.name) < 100
    place.write_text("")


def test_servers_whose_names_come_to_one_have_two_logs(tmp_path: Path) -> None:
    names = ["a/b", "a:b", "c"]
    assert len({log_of(tmp_path / "bench.json", name, names) for name in names}) == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", NAMES[:-2], ids=range(len(NAMES) - 2))
def test_a_bar_takes_any_name(name: str) -> None:
    stream = Terminal()
    with progress_bar("bench", 2, "requests", stream) as bar:
        bar.update(1, now=name)
    assert "bench" in stream.getvalue() and "\x1b[31mred" not in stream.getvalue()
