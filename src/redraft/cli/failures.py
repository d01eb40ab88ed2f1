"""What a command says when it fails for a reason that nobody foresaw: one line, and the whole trace in a file.

Nothing heavy is imported here, so that this works also where torch itself does not.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from redraft.errors import UserError
from redraft.files import atomic_write_text, disk_is_full, is_refused, write_error
from redraft.places import cache_folder, installed, without_keys

# Files that only a run directory of ours has; other folders are not written to.
MARKS = ("ledger.json", "study.json", "distill.json")
TRACE_FILE = "error.txt"
IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+@")


def as_user_error(error: BaseException, out: object = None) -> UserError | None:
    """A full disk or memory, or a place that the system refuses: no defect of ours. ``out`` is where the command
    writes."""
    if disk_is_full(error):
        return write_error(getattr(error, "filename", None) or str(out or "."), error)
    if is_refused(error):
        path, reason = getattr(error, "filename", None) or str(out or "."), getattr(error, "strerror", None) or error
        return UserError(f"cannot use {path}: {reason}; whatever was finished is kept")
    first = str(error).strip().partition("\n")[0]
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in first:
        return UserError(
            f"out of memory ({first or type(error).__name__}); ask for less at once (--batch-size, shorter texts) or "
            "take a larger machine; whatever was finished is kept"
        )
    return None


def without_secrets(text: str) -> str:
    """``text`` without user names and passwords of addresses, and without keys: of options, and the environment's."""
    return without_keys(IN_ADDRESS.sub("***@", text))


def trace(error: BaseException) -> str:
    """Command line, versions and traceback, without secrets."""
    lines = [
        f"time: {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"command: {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        f"versions: {', '.join(f'{name} {version}' for name, version in installed().items())}",
        f"system: {sys.platform}",
        "",
        "".join(traceback.format_exception(error)),
    ]
    return without_secrets("\n".join(lines))


def places(out: object) -> Iterator[Path]:
    """Where a trace may go, best first: the run directory, the cache, the folder for temporary files."""
    for folder in (Path(str(out)), Path(str(out), "run")) if out is not None else ():
        if any(os.path.isfile(folder / mark) for mark in MARKS):  # a run directory of ours, where it disturbs nobody
            yield folder / TRACE_FILE
    name = f"error-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.txt"
    yield cache_folder() / "errors" / name
    yield Path(tempfile.gettempdir()) / f"redraft-{name}"


def unexpected(error: BaseException, command: str, out: object = None) -> str:
    """The one line about ``error``; the trace is written where it can be."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    said = without_secrets(f"{type(error).__name__}: {first}"[:300].rstrip(": "))
    text, where = trace(error), "the full trace could not be written"
    for place in places(out):
        with suppress(UserError, OSError):
            atomic_write_text(place, text)
            where = f"the full trace is in {place}"
            break
    return (
        f"redraft: defect in {command}: {said}; this is not your input's fault and what was finished is kept; {where}, "
        f"and `redraft --debug {command} ...` shows it"
    )
