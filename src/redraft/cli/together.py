"""A command that ``torchrun`` has started in several processes at once: which can share their work, and who speaks."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from redraft.errors import UserError
from redraft.locks import is_helper, workers_started

# The commands that train.
SHARED = ("adapt", "distill", "train")
SPEAKING_SECONDS = 60.0


def words_of_workers() -> TextIO:
    """Silence all processes but the first, which says everything for all; where errors of the others go to."""
    errors = sys.stderr
    if is_helper():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    return errors


def speaks_for_all(error: BaseException) -> bool:
    """Whether this was said by the one of several processes that failed first."""
    return type(error).__name__ == "WorkerError"


def let_the_first_speak(error: BaseException) -> None:
    """Where all of several processes meet the same fault before they have found each other, the first one says it; and
    whoever ends the first makes torchrun end the others, so these wait to be ended."""
    torch = sys.modules.get("torch")
    met = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_helper() and not met and not speaks_for_all(error):
        time.sleep(SPEAKING_SECONDS)


def refuse_copies(command: str) -> None:
    """Raise ``UserError`` for a command that would be done several times over, in one place."""
    count = workers_started()
    if count > 1 and command not in SHARED:
        raise UserError(
            f"{count} processes were started, and redraft {command} cannot be shared among them; give it without "
            f"torchrun (what can be: {', '.join(SHARED)})"
        )
