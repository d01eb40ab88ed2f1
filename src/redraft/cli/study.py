"""``study``: a grid of methods, data, selections, losses, starts and seeds on the same footing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redraft.cli.common import Command, TemplateArgs, examples, say
from redraft.errors import UserError


def register(app: typer.Typer) -> None:
    """Add ``study`` to ``app``."""
    app.command(
        cls=Command,
        epilog=examples(
            "redraft study runs/studies/selection.yaml --out out/study",
            "redraft study runs/studies/selection.yaml --list",
            "redraft study --tables out/study/results.json",
        ),
    )(study)


def study(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the study (docs/studies/README.md).")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the study; a stopped one goes on from it.")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="Results file: make its tables and pictures again, and nothing else.")
    ] = None,
    list_cells: Annotated[bool, typer.Option("--list", help="Print the cells and stop.")] = False,
    template_arg: TemplateArgs = None,
    full: Annotated[Path | None, typer.Option(help="File for what full reached, as the quickstart reads it.")] = None,
) -> None:
    """Compare methods, data, selections, losses and starts: one results file, its tables and pictures."""
    if (config is None) == (tables is None):
        raise UserError("give the YAML file of a study, or --tables with the results of one")
    if tables is not None:
        from redraft.adaptation.study.tables import write_tables

        say(f"tables: {write_tables(tables, out)}")
        return
    assert config is not None
    if list_cells:
        from redraft.adaptation.study.config import read_study

        for number, cell in enumerate(read_study(config).all_cells(), 1):
            say(f"{number:4}  {cell.key}")
        return
    if out is None:
        raise UserError("name the folder of the study with --out")
    from redraft.api import adapting
    from redraft.data.template import parse_template_args

    found = adapting.study(config, out, template_arg=parse_template_args(template_arg or []), full=full, say=say)
    say(f"results: {found.results}; tables: {found.tables}")
