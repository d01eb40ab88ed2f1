"""A command that ``torchrun`` has started in several processes at once: which can share their work, and who speaks."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from redraft.errors import UserError
from redraft.locks import is_helper, workers_started

# The commands that train.
SHARED = ("adapt", "distill", "train")


def words_of_workers() -> TextIO:
    """Silence all processes but the first, which says everything for all; where errors of the others go to."""
    errors = sys.stderr
    if is_helper():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    return errors


def speaks_for_all(error: UserError) -> bool:
    """Whether this was said by the one of several processes that failed first."""
    return type(error).__name__ == "WorkerError"


def refuse_copies(command: str) -> None:
    """Raise ``UserError`` for a command that would be done several times over, in one place."""
    count = workers_started()
    if count > 1 and command not in SHARED:
        raise UserError(
            f"{count} processes were started, and redraft {command} cannot be shared among them; give it without "
            f"torchrun (what can be: {', '.join(SHARED)})"
        )
