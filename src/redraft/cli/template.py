"""``redraft config``: a commented YAML file of a command's settings, generated from them."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from redraft.cli.commands import COMMANDS
from redraft.cli.generate import PANELS, filled_in, sentence
from redraft.errors import UserError
from redraft.settings.base import Settings, known_name


def template(kind: type[Settings]) -> str:
    """All settings of a command as YAML with their help: required ones to fill in, the others at their defaults.

    Optional ones are comments, so that only what is changed counts as given; without their marks they are the defaults.
    """
    blocks = kind.model_construct().blocks()
    lines = [f"# Settings of `redraft {kind.COMMAND}`: `redraft {kind.COMMAND} --config FILE`; flags win, key by key."]
    for panel, names in PANELS.items():
        fields = [(name, kind.model_fields[name]) for name in names.split() if name in kind.model_fields]
        lines += ["", f"# -- {panel} {'-' * (100 - len(panel))}"] if fields else []
        for name, field in fields:
            lines += textwrap.wrap(filled_in(sentence(field)), 116, initial_indent="# ", subsequent_indent="# ")
            if field.is_required():
                lines.append(f"{name}:")
            elif name in blocks:
                lines += [f"# {name}:", *_block(blocks[name], kind.ONCE.get(name, {}).values())]
            else:
                lines.append(f"# {_line(name, field.get_default(call_default_factory=True))}")
    return "\n".join(lines) + "\n"


def _block(recipe: Any, above: Collection[str]) -> Iterator[str]:
    """The settings of a block; those ``above`` it have their place there."""
    for name, field in recipe.__pydantic_fields__.items():
        if name not in above:
            yield f"#   {_line(name, getattr(recipe, name)):<30}  # {field.description}"


def _line(name: str, value: Any) -> str:
    """``name: value`` in one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1000)
    return f"{name}: {text.removesuffix('...' + chr(10)).strip()}"


def register(app: typer.Typer) -> None:
    """Add ``config`` to ``app``."""

    @app.command(name="config", epilog="[bold]Examples[/bold]\n\n[cyan]redraft config adapt[/cyan]")
    def config(
        command: Annotated[str, typer.Argument(help="The command whose settings are printed.")] = "adapt",
    ) -> None:
        """Print all settings of a command as a commented YAML file, at their defaults."""
        kinds = {kind.COMMAND: kind for kind in COMMANDS}
        if command == "study":
            raise UserError("the settings of a study are a file of their own kind; see docs/studies/README.md")
        known_name("command", command, kinds)
        print(template(kinds[command]), end="")
