"""Writes the pages that follow from the code: docs/commands.md from the help of every command, docs/settings.md from
the settings models.

    python docs/tools/reference.py             write them
    python docs/tools/reference.py --check     say which of them are not what the code says; exit code 1 where one is

A test runs the second form, so that a page never tells of options that a command does not have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

os.environ |= {"TERM": "dumb", "COLUMNS": "200"}

import click
from typer.main import get_command

from redraft.cli.main import app
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.settings.training import PrivateSize, TrainConfig

DOCS = Path(__file__).resolve().parents[1]
WRITTEN = "<!-- Written by docs/tools/reference.py from the code; edit the help texts there. -->"
BOLD, COMMAND = re.compile(r"\[bold\](.*?)\[/bold\]"), re.compile(r"\[cyan\](.*?)\[/cyan\]")


def commands_page() -> str:
    """The command reference: what each command does, its examples, and its options by group."""
    group: Any = get_command(app)
    lines = [
        "# Commands",
        "",
        WRITTEN,
        "",
        f"{plain(group.help)}",
        "",
        "What `redraft COMMAND --help` says, on one page. Options that may be given several times are marked",
        "*repeatable*. Exit codes: 0 done, 2 a mistake in what was given (one line says which), 130 interrupted,",
        "1 a defect of redraft ([more](formats.md#when-a-command-fails)).",
        "",
        "| command | what it does |",
        "| --- | --- |",
    ]
    commands = {name: filled(command, name, group) for name, command in group.commands.items()}
    lines += [f"| [`redraft {name}`](#redraft-{name}) | {cell(first(c.help))} |" for name, c in commands.items()]
    lines += ["", "Before the command:", "", *options_table(group.params)]
    for name, command in commands.items():
        lines += ["", f"## redraft {name}", "", plain(command.help)]
        if found := COMMAND.findall(command.epilog or ""):
            lines += ["", "```bash", *found, "```"]
        for panel, parameters in by_panel(command.params).items():
            lines += ["", *([f"**{panel}**", ""] if panel else []), *options_table(parameters)]
    return "\n".join(lines) + "\n"


def filled(command: Any, name: str, group: Any) -> Any:
    """``command`` after its help was asked for, which is when names of registries and defaults are filled in."""
    context = click.Context(command, info_name=name, parent=click.Context(group, info_name="redraft"))
    with contextlib.redirect_stdout(io.StringIO()):
        command.get_help(context)
    return command


def by_panel(parameters: list[Any]) -> dict[str, list[Any]]:
    """Options in the groups that help shows them in; arguments come first, without one."""
    found: dict[str, list[Any]] = {}
    for parameter in sorted(parameters, key=lambda one: one.param_type_name != "argument"):
        found.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(parameter)
    return found


def options_table(parameters: list[Any]) -> list[str]:
    rows = [
        f"| {spelled(one)} | {cell(one.help or '')}{'; *repeatable*' if repeats(one) else ''} | {cell(default(one))} |"
        for one in parameters
        if one.name != "help" and not getattr(one, "hidden", False)
    ]
    return ["| option | meaning | default |", "| --- | --- | --- |", *rows]


def spelled(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name).upper()}`"
    return ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])


def repeats(parameter: Any) -> bool:
    many = getattr(parameter, "multiple", False) or parameter.nargs == -1
    return many and "repeat" not in (parameter.help or "")


def default(parameter: Any) -> str:
    """A default in the words of help; ``required``, or nothing."""
    if parameter.required:
        return "required"
    shown = getattr(parameter, "show_default", None)
    if isinstance(shown, str):
        return f"`{shown}`"
    value = parameter.default
    if value is None or callable(value) or isinstance(value, bool) or value in ((), [], "") or shown is False:
        return ""
    return f"`{', '.join(map(str, value)) if isinstance(value, list | tuple) else value}`"


def plain(text: str | None) -> str:
    """Help text as Markdown."""
    text = BOLD.sub(lambda found: f"`{found[1]}`", text or "")
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def first(text: str | None) -> str:
    return plain(text).split("\n\n")[0]


def cell(text: str) -> str:
    """Text that stands in a table cell: no bars, and no markup that Markdown would take for its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


# -- settings ------------------------------------------------------------------------------------------------------
MODELS: dict[str, tuple[str, Any]] = {
    "redraft adapt": ("Keys of `redraft adapt --config FILE`; each is a flag too.", AdaptConfig),
    "redraft distill": ("Keys of `redraft distill --config FILE`.", DistillConfig),
    "train": ("Keys of the block `train:` of `adapt` (`--train NAME=VALUE`) and of a study.", TrainConfig),
    "private": ("Keys of the block `private:` of `adapt` (`--private NAME=VALUE`).", PrivateSize),
}


def settings_page() -> str:
    """The settings reference: every key of a YAML file, its type, default and meaning."""
    lines = [
        "# Settings",
        "",
        WRITTEN,
        "",
        "What may stand in a YAML file, under the names of the flags (dashes or underscores). Flags win, key by key.",
        "An unknown key is refused with the nearest name.",
    ]
    for title, (about, kind) in MODELS.items():
        lines += ["", f"## {title}", "", about, "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for name, annotation, value, text in fields_of(kind):
            lines.append(f"| `{name}` | {cell(typed(annotation))} | {cell(value)} | {cell(text)} |")
    return "\n".join(lines) + "\n"


def fields_of(kind: Any) -> Iterator[tuple[str, Any, str, str]]:
    """Name, type, default and meaning of every setting of a model or of a recipe."""
    known = getattr(kind, "model_fields", None) or getattr(kind, "__pydantic_fields__", None)
    hints = get_type_hints(kind)
    if known is None:
        for field in dataclasses.fields(kind):
            yield field.name, hints[field.name], shown(field.default), ""
        return
    for name, field in known.items():
        value = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        yield name, hints[name], value, field.description or ""


def shown(value: Any) -> str:
    if value is None or value is dataclasses.MISSING or value in ((), [], {}):
        return ""
    if isinstance(value, tuple):
        value = f"[{', '.join(map(str, value))}]"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", Any: "any"}


def typed(hint: Any) -> str:
    """A type in words."""
    if hint in WORDS:
        return WORDS[hint]
    origin, inside = get_origin(hint), [one for one in get_args(hint) if one is not type(None) and one is not ...]
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (tuple, list):
        return f"list of {typed(inside[0])}s" if inside else "list"
    if origin is dict:
        return "block"
    return " or ".join(dict.fromkeys(typed(one) for one in inside)) if inside else getattr(hint, "__name__", str(hint))


PAGES = {"commands.md": commands_page, "settings.md": settings_page}


def outdated() -> Iterator[str]:
    for name, page in PAGES.items():
        path = DOCS / name
        if not path.exists() or path.read_text(encoding="utf-8") != page():
            yield name


def main() -> int:
    if "--check" in sys.argv[1:]:
        found = list(outdated())
        for name in found:
            print(f"docs/{name} is not what the code says; run python docs/tools/reference.py", file=sys.stderr)
        return int(bool(found))
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
