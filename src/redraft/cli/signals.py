"""How a command ends when it is told to: a key press and SIGTERM alike, with one line and the shell's own exit code.

Both reach the main thread between two instructions, whatever it does: compute, write, wait for a server or for a
thread. What was begun is undone or left for the next start to go on with, as after any other end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# What the threads are called that wait for a server's answers.
WAITING = "redraft-server"


class Terminated(KeyboardInterrupt):
    """SIGTERM, for whom a key press is known to."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is a ``Terminated`` in the main thread within the block; a second one ends the process at once."""
    usual = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not usual:  # in a thread, or where somebody else sees to it
        yield
        return

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stopped(error: KeyboardInterrupt) -> SystemExit:
    """Say that it has ended, and with which exit code: 143 for SIGTERM, 130 for a key press."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second key press ends it at once, and says nothing more
    ended = isinstance(error, Terminated)
    what = "terminated" if ended else "interrupted"
    print(f"redraft: {what}; the same command goes on where it can", file=sys.stderr, flush=True)
    return SystemExit(128 + (signal.SIGTERM if ended else signal.SIGINT))


def leave(code: int) -> NoReturn:
    """End this process with the exit code. Threads that still wait for a server are not waited for."""
    if any(thread.name.startswith(WAITING) for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Here alone: nothing else may load what a command does not need.
        if (locks := sys.modules.get("redraft.locks")) is not None:
            locks.release_all()
        os._exit(code)
    raise SystemExit(code)
