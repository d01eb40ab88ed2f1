"""``redraft config``: a commented YAML file of a command's settings, generated from them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from redraft.cli.commands import COMMANDS
from redraft.cli.generate import PANEL_OF, PANELS, filled_in, sentence
from redraft.settings.base import Settings, block_kind, known_name


def template(kind: type[Settings]) -> str:
    """All settings of a command as YAML with their help: required ones to fill in, the others at their defaults.

    Optional ones are comments, so that only what is changed counts as given. Read back as it is, with the required
    ones filled in, it gives the defaults.
    """
    lines = [f"# Settings of `redraft {kind.COMMAND}`: `redraft {kind.COMMAND} --config FILE`; flags win, key by key."]
    for panel, names in PANELS.items():
        fields = [(name, f) for name, f in kind.model_fields.items() if PANEL_OF.get(name, "Output") == panel]
        if fields:
            lines += ["", f"# -- {panel} {'-' * (100 - len(panel))}"]
        for name, field in sorted(fields, key=lambda item: names.split().index(item[0])):
            lines += _entry(name, field)
    return "\n".join(lines) + "\n"


def _entry(name: str, field: Any, indent: str = "") -> Iterator[str]:
    yield from textwrap.wrap(
        filled_in(sentence(field)), 116, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )
    block = block_kind(field)
    if field.is_required():
        yield f"{name}:"
    elif block is not None:
        yield f"# {name}:"
        for own, inner in block.__pydantic_fields__.items():
            yield f"#   {_line(own, inner.default):<30}  # {inner.description}"
    else:
        yield f"# {_line(name, field.get_default(call_default_factory=True))}"


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
        known_name("command", command, kinds)
        print(template(kinds[command]), end="")
