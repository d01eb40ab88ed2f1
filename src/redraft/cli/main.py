"""``redraft``: the application and its entry point."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from contextlib import suppress
from typing import Annotated, NoReturn, TextIO

import typer

from redraft import __version__
from redraft.cli import commands
from redraft.cli.failures import as_user_error, without_secrets
from redraft.cli.generate import Application
from redraft.cli.signals import leave, stopped, terminable
from redraft.cli.together import let_the_first_speak, speaks_for_all, words_of_workers
from redraft.errors import UserError
from redraft.files import STANDARD_OUTPUT
from redraft.registries import load_plugin

VARIABLES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
    "DATASETS_VERBOSITY": "error",
    # Any value silences the tokenizers' warning about forks; this one keeps them as fast as they are.
    "TOKENIZERS_PARALLELISM": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

app = typer.Typer(
    name="redraft",
    cls=Application,
    help="Realign a speculative-decoding draft with a fine-tuned target. Start with [bold]redraft quickstart[/bold], "
    "or with [bold]redraft probe[/bold] on your own model.",
    epilog="Every command explains itself: [cyan]redraft adapt --help[/cyan]",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def quiet_libraries() -> None:
    """Silence libraries that talk to a user about themselves; to be called before anything heavy is imported.

    What matters of their warnings is raised by redraft as an error of its own where it happens. Variables that the user
    has set stay as they are, ``python -W`` and ``PYTHONWARNINGS`` win, and ``redraft --debug`` silences nothing.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # What libraries log without a handler of their own goes through this one (matplotlib's font cache, for one).
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)
    for name in ("torch", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


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
            metavar="MODULE",
            help="Python module or file that registers a loss, scorer, start ...; before the command; repeatable.",
        ),
    ] = None,
) -> None:
    """Options that stand before the command."""
    if not debug:
        quiet_libraries()
    for name in plugin or ():
        load_plugin(name)


commands.register(app)


# What tables and help are laid out for, whatever a terminal or a variable says.
WIDTHS = (20, 1000)


def surroundings() -> None:
    """Variables that would break a page or a table: a width that no terminal has, and a screen for pictures, which are
    only ever written to files."""
    if (width := os.environ.get("COLUMNS", "")).isdecimal():
        os.environ["COLUMNS"] = str(min(max(int(width[:9]), WIDTHS[0]), WIDTHS[1]))
    os.environ["MPLBACKEND"] = "agg"


def streams() -> None:
    """Let every standard stream be there, and write whatever a name holds.

    Where one was closed, the next file that is opened would take its place, and what libraries say would go into it.
    """
    for number, mode in ((0, "r"), (1, "w"), (2, "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        name = ("stdin", "stdout", "stderr")[number]
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _require_folder() -> None:
    """Raise ``UserError`` where the working folder was removed: no name means anything there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the folder that this is called in was removed; change to one that is there") from None


def _refused(error: UserError, stream: TextIO) -> NoReturn:
    """The one line, and exit code 2, also where nobody can be told."""
    with suppress(OSError):
        if "--debug" in sys.argv[1:2]:
            traceback.print_exception(error, file=stream)
        print(f"redraft: error: {without_secrets(' '.join(str(error).split()))}", file=stream, flush=True)
    leave(2)


def main() -> None:
    """Run the application. A user's mistake is one line on standard error and exit code 2, a defect of ours 1."""
    surroundings()
    streams()
    errors = words_of_workers()
    try:
        with terminable():
            _require_folder()
            app()
    except UserError as error:
        let_the_first_speak(error)
        _refused(error, errors if speaks_for_all(error) else sys.stderr)
    except OSError as error:  # standard output is on a full disk, while help or a version is printed
        known = as_user_error(error, STANDARD_OUTPUT)
        if known is None:
            raise
        _refused(known, sys.stderr)
    except KeyboardInterrupt as error:
        leave(int(stopped(error).code or 0))
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code:
            let_the_first_speak(ended)
            leave(ended.code)
        raise


if __name__ == "__main__":
    main()
