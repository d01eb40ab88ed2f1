"""``redraft``: the application and its entry point."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from redraft import __version__
from redraft.cli import commands, template
from redraft.cli.quiet import quiet_libraries
from redraft.errors import UserError
from redraft.registries import load_plugin

app = typer.Typer(
    name="redraft",
    help="Realign a speculative-decoding draft with a fine-tuned target. Start with [bold]redraft quickstart[/bold], "
    "or with [bold]redraft probe[/bold] on your own model.",
    epilog="Every command explains itself: [cyan]redraft adapt --help[/cyan]",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"redraft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole trace of an error, and what libraries say.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE", help="Python module or file that registers a loss, scorer, start ...; repeatable."
        ),
    ] = None,
) -> None:
    """Options that stand before the command."""
    if not debug:
        quiet_libraries()
    for name in plugin or ():
        load_plugin(name)


commands.register(app)
template.register(app)


def main() -> None:
    """Run the application. A user's mistake is one line on standard error and exit code 2, a defect of ours 1."""
    try:
        app()
    except UserError as error:
        if "--debug" in sys.argv[1:2]:
            traceback.print_exception(error)
        print(f"redraft: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
