"""Writes the pages that follow from the code: docs/commands.md from the help of every command, docs/settings.md from
the settings models, docs/tutorial.md from docs/tutorial.py, docs/serve/options.md from the exporters (matrix.py).

    python docs/tools/reference.py             write them
    python docs/tools/reference.py --check     say which of them are not what the code says; exit code 1 where one is

A test runs the second form, so that a page never tells of options that a command does not have.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

os.environ |= {"TERM": "dumb", "COLUMNS": "200"}

import click
from typer.main import get_command

from redraft.cli.generate import filled_in, sentence
from redraft.cli.main import app
from redraft.settings import runs, steps, studies, training

DOCS = Path(__file__).resolve().parents[1]
WRITTEN = "<!-- Written by docs/tools/reference.py from {}; edit that. -->"
FROM_CODE = WRITTEN.format("the help texts in src/redraft/settings and src/redraft/cli")
BOLD, COMMAND = re.compile(r"\[bold\](.*?)\[/bold\]"), re.compile(r"\[cyan\](.*?)\[/cyan\]")


# -- the commands --------------------------------------------------------------------------------------------------
def commands_page() -> str:
    """The command reference: what each command does, its examples, and its options by group."""
    group: Any = get_command(app)
    lines = [
        "# Commands",
        "",
        FROM_CODE,
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
OLD = runs.adaptation("lora")
BLOCKS: dict[str, tuple[str, Any]] = {
    "The block train": (
        "Of `redraft adapt` (`--train NAME=VALUE`) and of a study. An old draft is trained with the method's own "
        f"`learning_rate`, {OLD['epochs']:g} `epochs` and {OLD['batch_anchors']} `batch_anchors` instead.",
        training.TrainConfig,
    ),
    "The block private": ("Of `redraft adapt` (`--private NAME=VALUE`): the part that is added.", training.PrivateSize),
    "The block pretrain": ("Of `redraft distill`.", training.PretrainConfig),
    "The block align": ("Of `redraft distill`.", training.DistilConfig),
    "The block replay": ("Of a method of a study.", training.ReplayConfig),
}
MODELS: dict[str, tuple[str, Any]] = {
    "redraft adapt": ("Each is a flag too.", runs.AdaptConfig),
    "redraft train": ("Each is a flag too.", steps.TrainSettings),
    "redraft distill": ("Each is a flag too.", runs.DistillConfig),
    "redraft study": (
        "The file of a study; [an example with all its parts](studies/README.md#the-config).",
        studies.StudyConfig,
    ),
} | BLOCKS


def settings_page() -> str:
    """The settings reference: every key of a YAML file, its type, bounds, default and meaning."""
    lines = [
        "# Settings",
        "",
        FROM_CODE,
        "",
        "What may stand in a YAML file (`--config FILE`), under the names of the flags, with dashes or underscores.",
        "Flags win, key by key. An unknown key is refused with the nearest name, a setting that is given two values",
        "with both, and all mistakes of a file are told at once. `redraft config COMMAND` prints a file with all",
        "settings of a command at their defaults. Commands that are not here take their [flags](commands.md) as keys.",
    ]
    for title, (about, kind) in MODELS.items():
        lines += ["", f"## {title}", "", about, "", "| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{name}` | {' | '.join(map(cell, told(field)))} |" for name, field in fields_of(kind)]
    return "\n".join(lines) + "\n"


def fields_of(kind: Any) -> Iterable[tuple[str, Any]]:
    """Name and field of every setting of a model or of a recipe."""
    known = getattr(kind, "model_fields", None) or kind.__pydantic_fields__
    return known.items()


def told(field: Any) -> tuple[str, str, str]:
    """What a setting may be, its default and its meaning."""
    value = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
    about = filled_in(sentence(field)).removesuffix(" Required.").replace("; repeatable", "")
    return ", ".join([typed(field.annotation), *bounds(field)]), value, about


def bounds(field: Any) -> Iterator[str]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for one in field.metadata:
        for name, said in words.items():
            if (limit := getattr(one, name, None)) is not None:
                yield f"{said} {limit:g}"


def shown(value: Any) -> str:
    """A default as YAML has it; nothing where there is none, or a block of defaults."""
    if value is None or isinstance(value, dict) or value in ((), [], ""):
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
    if origin is Annotated:
        return typed(inside[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (tuple, list):
        return f"list of {typed(inside[0])}s" if inside else "list"
    return " or ".join(dict.fromkeys(typed(one) for one in inside)) if inside and origin is not dict else "block"


# -- the tutorial --------------------------------------------------------------------------------------------------
def tutorial_page() -> str:
    """docs/tutorial.py as a page: its Markdown cells as they are, its code in blocks."""
    cells = re.split(r"^# %%", (DOCS / "tutorial.py").read_text(encoding="utf-8"), flags=re.M)[1:]
    parts = []
    for kind, _, body in (one.partition("\n") for one in cells):
        if "[markdown]" in kind:
            parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()))
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    title, _, rest = parts[0].partition("\n")
    return "\n\n".join([title, WRITTEN.format("docs/tutorial.py"), rest.strip(), *parts[1:]]) + "\n"


# -- what each format holds ----------------------------------------------------------------------------------------
def options_page() -> str:
    """Which option of a draft each format holds, as the exporters say."""
    made = runpy.run_path(str(DOCS / "tools" / "matrix.py"))
    page: str = made["options_page"](WRITTEN.format("what the exporters say, asked by docs/tools/matrix.py"))
    return page


PAGES = {
    "commands.md": commands_page,
    "settings.md": settings_page,
    "tutorial.md": tutorial_page,
    "serve/options.md": options_page,
}


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
