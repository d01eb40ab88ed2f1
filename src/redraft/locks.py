"""One process at a time: who writes a run directory, a response file or a cache holds its lock for as long as it lives.

The lock is the system's own (``flock``) on a file that names process, machine and time, so that a second process can be
told who has it; the system lets go of it however the first one dies. The file goes with the lock. What the library of
the same purpose among the dependencies of others lacks is said holder, and that a forked child which outlives its
parent does not go on holding.

Several processes that train together are one job: the first of them holds the lock for all.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from redraft.errors import UserError
from redraft.files import clean, use_folder, write_error

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
# What file systems say that have no locks.
WITHOUT = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)
WAIT_SECONDS = 0.2
Say = Callable[[str], None]


@dataclass
class Lock:
    """A lock that this process holds, ``count`` times over by the thread that took it. ``handle`` is none where the
    file system knows no locks."""

    path: Path
    handle: int | None
    thread: int = field(default_factory=threading.get_ident)
    count: int = 1

    def release(self) -> None:
        """Let go of it once; of the file too when that was the last time."""
        self.count -= 1
        if not self.count and _HELD.get(self.path) is self:
            del _HELD[self.path]
            if self.handle is not None:
                with suppress(OSError):
                    self.path.unlink()  # while it is held: who opened it before finds that it is gone
                with suppress(OSError):
                    os.close(self.handle)


_HELD: dict[Path, Lock] = {}
_GUARD = threading.RLock()


def lock(path: str | Path, what: str, wait: float = 0.0, say: Say | None = None) -> Lock:
    """Take the lock whose file is ``path``, up to ``wait`` seconds long; ``what`` names what is locked in messages.

    The same thread may take it again. Raises ``UserError`` that names who has it, and when the file cannot be written.
    """
    path, until, told = Path(os.path.realpath(path)), time.monotonic() + wait, False
    while True:
        with _GUARD:
            known = _HELD.get(path)
            if known is not None and known.thread == threading.get_ident():
                known.count += 1
                return known
            if known is None:
                found = _take(path, what, say)
                if found is not None:
                    _HELD[path] = found
                    return found
        if time.monotonic() >= until:
            raise UserError(f"{what} is in use by {_holder(path)}; wait for it or stop it, then give the command again")
        if say is not None and not told:
            say(f"waiting for {what}, which is in use by {_holder(path)}")
            told = True
        time.sleep(WAIT_SECONDS)


@contextmanager
def held(folder: str | Path, what: str = "run directory", say: Say | None = None) -> Iterator[None]:
    """A run directory for this process alone within the block; it is made, and what dead processes left is removed.

    Raises ``UserError`` as :func:`lock`.
    """
    if is_helper():
        yield
        return
    use_folder(folder, what)
    taken = lock(Path(folder, LOCK_FILE), f"{what} {folder}", say=say)
    try:
        if taken.count == 1:
            clean(folder)
        yield
    finally:
        taken.release()


def contents(folder: str | Path) -> list[Path]:
    """What is in a folder besides its lock."""
    return [entry for entry in Path(folder).iterdir() if entry.name != LOCK_FILE]


def is_helper() -> bool:
    """Whether this is another than the first of several processes that train together."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return bool(torch.distributed.get_rank())
    return workers_started() > 1 and os.environ.get("RANK", "0") != "0"


def workers_started() -> int:
    """How many processes were started with this command, as ``torchrun`` says; 1 where it was started alone."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() and "RANK" in os.environ else 1


def _take(path: Path, what: str, say: Say | None) -> Lock | None:
    """The lock; none where another process has it."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no locks")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, handle):
                _sign(handle)
                return Lock(path, handle)
            os.close(handle)  # who had it has let go and taken the file along
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            os.close(handle)
            if error.errno not in WITHOUT:
                raise write_error(path, error) from error
            with suppress(OSError):
                path.unlink()
            (say or print)(f"note: no locks work where {what} is: let no second process use it")
            return Lock(path, None)
        except BaseException:
            os.close(handle)
            raise


def _is_there(path: Path, handle: int) -> bool:
    """Whether the file of this name is the one that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Write who has it. On a full disk nobody is told, which keeps nobody out any less."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(about).encode(), 0)


def _holder(path: Path) -> str:
    """Who has the lock, as its file says."""
    about: Any = None
    with suppress(OSError, ValueError):
        about = json.loads(path.read_text())
    if not isinstance(about, dict) or not {"pid", "host", "since"} <= about.keys():
        return "another process"
    own = about["pid"] == os.getpid() and about["host"] == socket.gethostname()
    who = "another thread of this process" if own else f"process {about['pid']} on {about['host']}"
    return f"{who} since {about['since']}"


def _let_go_in_child() -> None:
    """A forked child holds nothing: the lock is its parent's, also when the child lives longer."""
    global _GUARD
    _GUARD = threading.RLock()
    for taken in _HELD.values():
        if taken.handle is not None:
            with suppress(OSError):
                os.close(taken.handle)
    _HELD.clear()


def release_all() -> None:
    """Let go of every lock at the end of this process."""
    for taken in list(_HELD.values()):
        taken.count = 1
        taken.release()


atexit.register(release_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
