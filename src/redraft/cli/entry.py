"""Where the command ``redraft`` begins: a key press or SIGTERM while the package is read is one line too."""

from __future__ import annotations

import signal
import sys

from redraft.cli.signals import Terminated, terminable


def main() -> None:
    """Run the application (:func:`redraft.cli.main.main`)."""
    with terminable():
        try:
            from redraft.cli.main import main as command_line
        except KeyboardInterrupt as error:
            ended = isinstance(error, Terminated)
            what = "terminated" if ended else "interrupted"
            print(f"redraft: {what} before anything was begun", file=sys.stderr, flush=True)
            raise SystemExit(128 + (signal.SIGTERM if ended else signal.SIGINT)) from None
        command_line()
