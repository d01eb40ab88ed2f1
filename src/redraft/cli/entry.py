"""Where the command ``redraft`` begins: a key press while the package is still being read is one line too."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the application (:func:`redraft.cli.main.main`)."""
    try:
        from redraft.cli.main import main as command_line
    except KeyboardInterrupt:
        print("redraft: interrupted before anything was begun", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    command_line()
